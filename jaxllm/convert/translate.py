"""From one checkpoint's tensors to another's, a tensor at a time: other names and layouts, another family's structure.

A family expresses a spec when its config.json reads back as it. One that does not may express an equal function: with
biases that are zero, rotary pairs in the other order, a window that nothing within the context reaches. `nearest` finds
it, `Translation` carries the weights over.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm import rules
from jaxllm.architectures import Spec, model_params
from jaxllm.config import GLU, GQA, MLP, Block, Full, Local, Rope, Transformer
from jaxllm.models.common import layers_of, places, stacks_of
from jaxllm.models.families import FAMILIES, Family, expressed, family_of_spec
from jaxllm.params import ParamTree, paths
from jaxllm.rules import Read, Table, Tensor

Piece = Callable[[str, tuple[int, ...]], np.ndarray]
"""(path, indices of its leading axes) -> that part of a parameter."""

# ---------------------------------------------------------------------------------------------------- equal functions

Edit = Callable[[Block, int], Block]  # (layer, the model's context)


def _gqa(change: Callable[[GQA, int], GQA]) -> Edit:
    def edit(block: Block, context: int) -> Block:
        attn = block.attn
        return replace(block, attn=change(attn, context)) if isinstance(attn, GQA) else block

    return edit


def _ffn_bias(block: Block, context: int) -> Block:
    ffn = block.ffn
    return replace(block, ffn=replace(ffn, bias=not ffn.bias)) if isinstance(ffn, MLP | GLU) else block


def _other_pairs(attn: GQA, context: int) -> GQA:
    rope = attn.position
    if not isinstance(rope, Rope):
        return attn
    return replace(attn, position=replace(rope, interleaved=not rope.interleaved))


def _no_window(attn: GQA, context: int) -> GQA:
    pattern = attn.pattern
    return replace(attn, pattern=Full()) if isinstance(pattern, Local) and pattern.window >= context else attn


def _usual_scale(attn: GQA, context: int) -> GQA:
    return replace(attn, scale=None) if attn.scale == attn.head_dim**-0.5 else attn


EDITS: tuple[Edit, ...] = (
    _gqa(_usual_scale),
    _gqa(_no_window),
    _gqa(_other_pairs),
    _gqa(lambda attn, context: replace(attn, qkv_bias=not attn.qkv_bias)),
    _gqa(lambda attn, context: replace(attn, out_bias=not attn.out_bias)),
    _ffn_bias,
)


def _edited(spec: Transformer, edits: Sequence[Edit]) -> Transformer:
    blocks = layers_of(spec)
    for edit in edits:
        blocks = [edit(block, spec.context) for block in blocks]
    return replace(spec, stacks=stacks_of(blocks))


def _biases(spec: Transformer) -> int:
    return sum(path.endswith("/bias") for path in _shapes(spec))


def nearest(spec: Spec, name: str | None) -> tuple[Family, dict[str, Any], Spec]:
    """A family, its config, and the spec nearest to `spec` that this config expresses; any family when name is None.

    Nearest: biases are added (as zeros) rather than dropped, and as little as possible is changed. Raises ValueError
    for an unknown family, and when it expresses no equal function.
    """
    if name is None:
        return *family_of_spec(spec), spec
    family = FAMILIES.get(name)
    if family is None:
        raise ValueError(f"--family {name}: not known; known are {sorted(FAMILIES)}")
    if not isinstance(spec, Transformer):
        config = expressed(family, spec)
        if config is not None:
            return family, config, spec
    else:
        choices = [picked for n in range(len(EDITS) + 1) for picked in itertools.combinations(EDITS, n)]
        named = replace(spec, name=name)
        specs = sorted((_edited(named, edits) for edits in choices), key=lambda s: _biases(s) < _biases(spec))
        for candidate in specs:
            config = expressed(family, candidate)
            if config is not None:
                return family, config, candidate
    raise ValueError(
        f"--family {name}: its config.json expresses neither this {spec.name!r} model nor one that differs in biases, "
        "the order of rotary pairs or unused windows alone; convert it without --family"
    )


# ------------------------------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Translation:
    """Parameters of `target` from pieces of those of `source`, whose layers are equal functions."""

    source: Spec
    target: Spec
    piece: Piece

    def check(self) -> None:
        """Raise ValueError when the target drops a parameter that is not zero; only what is dropped is read."""
        if not isinstance(self.source, Transformer) or not isinstance(self.target, Transformer):
            return
        kept = {_rest(path) for path in _shapes(self.target)}
        dropped = [path for path in _shapes(self.source) if _rest(path) not in kept]
        for path in dropped:
            if np.any(self.piece(path, ())):
                raise ValueError(
                    f"{path} is not zero, and {self.target.name!r} has no place for it; choose a family with this bias"
                )

    def __call__(self, path: str, where: tuple[int, ...]) -> np.ndarray:
        """A piece of a parameter of the target."""
        source, target = self.source, self.target
        if not (isinstance(source, Transformer) and isinstance(target, Transformer) and path.startswith("stacks/")):
            return self.piece(path, where)
        rest = _rest(path)
        layer = _addresses(target).index((path.removesuffix(rest), where[0]))
        at, index = _addresses(source)[layer]
        if at + rest not in _shapes(source):
            return np.zeros(_shapes(target)[path][len(where) :], np.float32)
        part = self.piece(at + rest, (index, *where[1:]))
        before, after = (layers_of(spec)[layer].attn for spec in (source, target))
        return _in_order(part, before, after) if rest.startswith(ROTATED) else part


def _rest(path: str) -> str:
    """A parameter's path within its layer; other paths as they are."""
    return path.split("/", 3)[-1] if path.startswith("stacks/") else path


@lru_cache(16)
def _shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    return {path: param.shape for path, param in paths(model_params(spec))}


ROTATED = ("attn/q/", "attn/k/", "attn/q_norm/", "attn/k_norm/")


@lru_cache(16)
def _addresses(spec: Transformer) -> list[tuple[str, int]]:
    """Of every layer in order: the path of its place, and its index there."""
    found = {n: (at, i) for at, numbers in places(spec) for i, n in enumerate(numbers)}
    return [found[n] for n in sorted(found)]


def _in_order(part: np.ndarray, before: Any, after: Any) -> np.ndarray:
    """The last axis [..., H] with its rotary pairs (i, i + w/2) or (2i, 2i + 1), as `after` wants them."""
    old, new = before.position, after.position
    if not isinstance(old, Rope) or not isinstance(new, Rope) or old.interleaved == new.interleaved:
        return part
    width = old.width(before.head_dim)
    order = np.arange(width).reshape((2, -1) if new.interleaved else (-1, 2)).T.ravel()
    return np.concatenate([part[..., :width][..., order], part[..., width:]], -1)


def pieces(table: Table, tree: ParamTree, read: Read) -> Piece:
    """Pieces of parameters from a checkpoint's tensors, of which the last one read is kept."""
    owners = {path: (rule, k) for rule in rules.tensors(table) for k, path in enumerate(rule.paths)}
    declared = dict(paths(tree))
    last = lru_cache(1)(read)

    def piece(path: str, where: tuple[int, ...]) -> np.ndarray:
        rule, k = owners[path]
        if len(where) < len(rule.each):
            return np.stack([piece(path, (*where, i)) for i in range(len(rule.each[len(where)]))])
        own = where[: len(rule.each)]
        name = rule.name.format(*(numbers[i] for numbers, i in zip(rule.each, own, strict=True)))
        shapes = [declared[p].shape[len(own) :] for p in rule.paths]
        return rules.to_native(rule, last(name), shapes)[k][where[len(own) :]]

    return piece


def pieces_of(params: Mapping[str, Any]) -> Piece:
    """Pieces of parameters that are there."""
    flat = dict(rules.paths_of_weights(params))
    return lambda path, where: np.asarray(flat[path])[where]


def export(table: Table, piece: Piece, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor in the table's order, each made when it is asked for.

    Raises ValueError naming a tensor with numbers beyond the range of `dtype`.
    """
    for rule in rules.tensors(table):
        for where in product(*(range(len(numbers)) for numbers in rule.each)):
            numbers = [n[i] for n, i in zip(rule.each, where, strict=True)]
            name = rule.name.format(*numbers)
            yield name, narrowed(name, _tensor(rule, piece, where), dtype)


def _tensor(rule: Tensor, piece: Piece, where: tuple[int, ...]) -> np.ndarray:
    return rules.to_hf(rule, [piece(path, where) for path in rule.paths])


def narrowed(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x as `dtype`. Raises ValueError when a finite number would become infinite."""
    if x.dtype == dtype:
        return x
    largest = max(float(x.max(initial=0)), -float(x.min(initial=0)))
    if math.isfinite(largest) and largest > float(jnp.finfo(dtype).max):
        raise ValueError(f"{name}: its largest number {largest} is beyond {dtype}; take bfloat16 or float32")
    return x.astype(dtype)
