"""Patterns that depend on the row's length, as patterns that do not."""

from __future__ import annotations

from jaxllm.config import And, BigBird, Blocks, Columns, Full, Or, Pattern, RandomBlocks, Rows


def at_length(pattern: Pattern, length: int) -> Pattern:
    """`pattern` for rows of `length` slots, 0 .. length - 1.

    A `BigBird` with seed None describes `length + pattern.copies(length)` keys, the copies behind the row; it must
    stand alone. Raises ValueError for one inside of `&` or `|`.
    """
    match pattern:
        case BigBird():
            return _bigbird(pattern, length)
        case And(left, right) | Or(left, right):
            for part in (left, right):
                if isinstance(part, BigBird) and part.copies(length):
                    raise ValueError(f"{part} counts keys twice, which no mask can; give it a seed to combine it")
            return type(pattern)(at_length(left, length), at_length(right, length))
        case _:
            return pattern


def _bigbird(cfg: BigBird, length: int) -> Pattern:
    if cfg.whole(length):
        return Full()
    size, last = cfg.block, (length - 1) // cfg.block * cfg.block
    seen = Blocks(size, 1) | Columns(0, size) | Columns(last, length) | Rows(0, size) | Rows(last, length)
    if cfg.seed is not None:
        return seen | RandomBlocks(size, cfg.random, length, cfg.seed) if cfg.random else seen
    copies = Columns(length, length + cfg.copies(length)) & Rows(size, last)
    return (seen & Columns(0, length)) | copies
