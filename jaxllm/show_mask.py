"""Pictures of who sees whom: a pattern, or those of a model's layers, as PNG. `jaxllm show-mask`."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxllm import config
from jaxllm.architectures import Spec
from jaxllm.config import Causal, EncoderDecoder, Pattern, Transformer
from jaxllm.kernels.bigbird import at_length
from jaxllm.kernels.pattern import allowed

WORDS = [
    "Full",
    "Causal",
    "Local",
    "Dilated",
    "Strided",
    "Fixed",
    "Blocks",
    "RandomBlocks",
    "Rows",
    "Columns",
    "GlobalTokens",
    "BigBird",
]  # what a pattern is written with


def pattern_of(text: str) -> Pattern:
    """The pattern that is written as in Python: "Causal() & (Local(64) | GlobalTokens(2))". Nothing is executed.

    Raises ValueError for anything else.
    """

    def read(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left, ast.BitAnd(), right):
                return read(left) & read(right)
            case ast.BinOp(left, ast.BitOr(), right):
                return read(left) | read(right)
            case ast.Call(ast.Name(name), args, keywords) if name in WORDS:
                named = {k.arg: ast.literal_eval(k.value) for k in keywords if k.arg is not None}
                return getattr(config, name)(*map(ast.literal_eval, args), **named)
            case _:
                raise ValueError(
                    f"{ast.unparse(node)!r} is no pattern; known are {', '.join(WORDS)}, joined by & and |"
                )

    try:
        return read(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"{text!r} is no pattern ({error}); write for example 'Causal() & Local(64)'") from error


def patterns_in(spec: Spec) -> dict[str, Pattern]:
    """Every distinct pattern of a model's self-attention, by the first layer that has it.

    Raises ValueError for a model that sees images.
    """
    match spec:
        case EncoderDecoder(encoder, decoder):
            parts = {"encoder": patterns_in(encoder), "decoder": patterns_in(decoder)}
            return {f"{part}, {name}": p for part, found in parts.items() for name, p in found.items()}
        case Transformer():
            blocks = [block for stack in spec.stacks for _ in range(stack.repeats) for block in stack.pattern]
            own = [Causal() & b.attn.pattern if spec.causal else b.attn.pattern for b in blocks]
            return {f"layer {own.index(p)}": p for p in dict.fromkeys(own)}
        case _:
            raise ValueError(f"show-mask: draws transformers and encoder-decoders, found a {type(spec).__name__}")


def visible(pattern: Pattern, length: int) -> Bool[np.ndarray, "T S"]:
    """Which query (row) sees which key (column) in a row of `length` tokens."""
    slots = np.arange(length, dtype=np.int32)
    plain = at_length(pattern, length)
    return np.broadcast_to(allowed(plain, slots[:, None], slots[None]), (length, length))


def draw(patterns: dict[str, Pattern], length: int, out: Path) -> list[str]:
    """Write the picture, black where a key is seen; a line for each pattern: its name, itself, the share of pairs.

    Raises ValueError for a length that no picture shows, OSError with the cure when matplotlib is missing.
    """
    if not 1 <= length <= 8192:
        raise ValueError(f"show-mask: length={length} must be in 1..8192; longer rows have more tokens than pixels")
    masks = {name: visible(p, length) for name, p in patterns.items()}
    figure = new_figure(figsize=(5.2 * len(masks), 5.4))
    axes = figure.subplots(1, len(masks), squeeze=False)
    for axis, (name, mask) in zip(axes[0], masks.items(), strict=True):
        axis.imshow(~mask, cmap="gray", interpolation="nearest", vmin=0, vmax=1, origin="upper")
        axis.set(title=f"{name}: {100 * mask.mean():.1f} % of pairs", xlabel="key", ylabel="query")
    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.rename(out)
    return [f"{name}: {p}, {100 * masks[name].mean():.2f} % of pairs" for name, p in patterns.items()]


def new_figure(**options: Any) -> Any:
    """A matplotlib Figure, drawn without a display. Raises OSError with the cure when matplotlib is missing."""
    try:
        return importlib.import_module("matplotlib.figure").Figure(layout="constrained", **options)
    except ImportError as error:
        raise OSError('drawing needs matplotlib; run: pip install "jaxllm[plot]"') from error
