"""Parameters are declared once, as a tree of `Param`; everything else about them derives from that tree.

A tree is nested plain dicts (the Flax `params` convention) whose leaves are `Param` here, and arrays or other weights
(`jaxllm.leaves`) once initialised or loaded. `init`, `abstract`, `count`, `paths` and the shardings all map over it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, assert_never

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


@dataclass(frozen=True)
class Normal:
    """Normal of standard deviation `std`, cut off at two of it."""

    std: float


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float


Init = Normal | Constant


@dataclass(frozen=True)
class Param:
    """A parameter that does not exist yet: its shape, the logical name of each axis, how it starts.

    Logical axes ("embed", "heads", "ffn", "vocab", "layers" ...) are mapped to mesh axes by a rule table
    (`jaxllm.sharding`).  outputs: how many trailing axes a projection gives; the others (but "layers" and "experts")
    are contracted.  exact: used in float32 whatever the compute dtype (routers).  stored: dtype of the master.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    outputs: int = 1
    exact: bool = False
    stored: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"Param: shape {self.shape} needs one logical axis name per dimension, got {self.axes}")


ParamTree = dict[str, Any]  # nested dicts of Param


def is_param(x: object) -> bool:
    """True for a declared parameter: the `is_leaf` of every map over a ParamTree."""
    return isinstance(x, Param)


def leaves(tree: ParamTree) -> list[Param]:
    """All declared parameters, in path order."""
    return jax.tree.leaves(tree, is_leaf=is_param)


def map_params(f: Callable[..., Any], tree: ParamTree, *rest: Any) -> Any:
    """`jax.tree.map` whose first tree is declared; `rest` may hold any leaf (a whole Quantised, say) in each place."""
    return jax.tree.map(f, tree, *rest, is_leaf=is_param)


def map_with_paths(f: Callable[[str, Param], Any], tree: ParamTree) -> Any:
    """f("attn/q/kernel", param) for every declared parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, p: f(path_name(path), p), tree, is_leaf=is_param)


def path_name(path: tuple[Any, ...]) -> str:
    """'stacks/0/0/attn/q/kernel' from a jax key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def paths(tree: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs of a declared or real tree; leaves are Param, or whatever jax takes for a leaf."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_param)[0]:
        yield path_name(path), leaf


def count(tree: ParamTree) -> int:
    """Number of scalar parameters. No array is made."""
    return sum(math.prod(p.shape) for p in leaves(tree))


def abstract(tree: ParamTree, dtype: DTypeLike = jnp.float32) -> Any:
    """The tree as `jax.ShapeDtypeStruct`, for lowering, restoring and planning."""
    return map_params(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), tree)


def init(tree: ParamTree, key: Array, dtype: DTypeLike | None = None) -> Any:
    """Arrays for every parameter, each drawn from `key` and its own path: neighbours and layout do not matter.

    dtype: None for that of each parameter's master.
    """

    def one(path: tuple[Any, ...], p: Param) -> Array:
        dtype_ = p.stored if dtype is None else dtype
        match p.init:
            case Normal(std):
                own = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()) & 0x7FFFFFFF)
                return (jax.random.truncated_normal(own, -2.0, 2.0, p.shape, jnp.float32) * std).astype(dtype_)
            case Constant(value):
                return jnp.full(p.shape, value, dtype_)
            case other:
                assert_never(other)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_param)


def stacked(tree: ParamTree, repeats: int) -> ParamTree:
    """The tree of one layer, with a leading "layers" axis of `repeats` on every parameter."""
    return map_params(lambda p: replace(p, shape=(repeats, *p.shape), axes=("layers", *p.axes)), tree)


def layer(tree: Any, index: int | Array) -> Any:
    """One layer's slice of a stacked tree of arrays."""
    return jax.tree.map(lambda a: a[index], tree)


def unstack(params: Any) -> Any:
    """Split every stack into a list of layers, each with arrays of its own.

    A scan reads its layer through a slice of the stacked array; XLA on CPU copies that slice, i.e. writes and reads
    all weights once more for every token decoded. A list of layers is run as a Python loop instead.
    """

    def split(stack: Any) -> list[Any]:
        return [layer(stack, i) for i in range(jax.tree.leaves(stack)[0].shape[0])]

    stacks = {s: {b: split(block) for b, block in stack.items()} for s, stack in params["stacks"].items()}
    return params | {"stacks": stacks}
