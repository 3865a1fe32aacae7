"""Invertible rules between a published checkpoint's tensors and our parameters. A family's table is a list of them.

From one table come import, export, and the checks for missing, extra and misshapen tensors before anything is
allocated. How axes correspond is a pattern in letters of the dimension key, read from the file's tensor to ours:

    "(N H) D -> D N H"      a PyTorch linear [out, in], its outputs split into heads

Sizes are bound by the shapes of our declared parameters. The letter X joins several parameters into one tensor:

    Tensor("h.{}.attn.c_attn.weight", ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel"), "D (X H) -> D X H", ...)

Both directions only move numbers, so export after import gives back the same bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, assert_never

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from jaxllm.leaves import dense
from jaxllm.params import Param, ParamTree, paths

Shape = tuple[int, ...]
Groups = tuple[tuple[str, ...], ...]
JOIN = "X"


@dataclass(frozen=True)
class Tensor:
    """The tensors `name.format(i, j ...)` for i, j in `each` <-> the parameters at `paths`.

    The parameters' leading axes run over `each` (layers, experts); `layout` relates what is left of them to one
    tensor, None when they are alike.  sizes: letters that shapes alone do not bind, as in "(N X H) D -> D (N X) H".
    """

    name: str
    paths: tuple[str, ...]
    layout: str | None = None
    each: tuple[range, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Alias:
    """A second copy of a parameter that some files hold (a tied head). It must equal the first; it is not exported."""

    name: str
    of: str


@dataclass(frozen=True)
class Unused:
    """Tensors that some files hold and no logit depends on (mask buffers, frequency tables). A shell-style pattern."""

    pattern: str


Rule = Tensor | Alias | Unused
Table = Sequence[Rule]

# -------------------------------------------------------------------------------------------- one tensor, both ways


def _groups(side: str) -> Groups:
    return tuple(tuple((a or b).split()) for a, b in re.findall(r"\(([^)]*)\)|(\S+)", side))


def _sides(rule: Tensor, shape: Shape) -> tuple[Groups, Groups]:
    if rule.layout is None:
        same = tuple((f"axis{i}",) for i in range(len(shape)))
        return same, same
    theirs, ours = rule.layout.split("->")
    return _groups(theirs), _groups(ours)


def _bind(groups: Groups, shape: Shape, known: Mapping[str, int]) -> dict[str, int]:
    """The size of each letter; one unknown letter per group is what the known ones leave."""
    if len(groups) != len(shape):
        raise ValueError(f"layout {groups} has {len(groups)} axes, the parameter has shape {shape}; correct the table")
    sizes = dict(known)
    for group, n in zip(groups, shape, strict=True):
        unknown = [letter for letter in group if letter not in sizes]
        rest = math.prod(sizes[letter] for letter in group if letter in sizes)
        if len(unknown) > 1 or n % rest or (not unknown and n != rest):
            raise ValueError(
                f"layout group {group} does not fit an axis of {n} with {sizes}; give `sizes` in the table"
            )
        sizes |= dict.fromkeys(unknown, n // rest)
    return sizes


def tensor_shape(rule: Tensor, shapes: Sequence[Shape]) -> Shape:
    """Shape of one tensor, from the shapes of its parameters without the axes of `each`."""
    theirs, ours = _sides(rule, shapes[0])
    bound = [_bind(ours, shape, dict(rule.sizes)) for shape in shapes]
    total = bound[0] | ({JOIN: sum(b[JOIN] for b in bound)} if JOIN in bound[0] else {})
    return tuple(math.prod(total[letter] for letter in group) for group in theirs)


def to_native(rule: Tensor, x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """The parameters' parts (of `shapes`) in one tensor; views where strides allow."""
    theirs, ours = _sides(rule, shapes[0])
    bound = [_bind(ours, shape, dict(rule.sizes)) for shape in shapes]
    flat = [letter for group in theirs for letter in group]
    order = [flat.index(letter) for group in ours for letter in group]
    total = bound[0] | ({JOIN: sum(b[JOIN] for b in bound)} if JOIN in flat else {})
    x = x.reshape([total[letter] for letter in flat])
    if JOIN in flat:
        cuts = np.cumsum([b[JOIN] for b in bound])[:-1]
        parts = np.split(x, cuts, axis=flat.index(JOIN))
    else:
        parts = [x]
    return [part.transpose(order).reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def to_hf(rule: Tensor, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor made of the parameters' parts: the inverse of `to_native`."""
    theirs, ours = _sides(rule, parts[0].shape)
    flat = [letter for group in theirs for letter in group]
    back = [letter for group in ours for letter in group]
    turned = []
    for part in parts:
        bound = _bind(ours, part.shape, dict(rule.sizes))
        turned.append(
            part.reshape([bound[letter] for letter in back]).transpose([back.index(letter) for letter in flat])
        )
    whole = np.concatenate(turned, axis=flat.index(JOIN)) if JOIN in flat else turned[0]
    return whole.reshape(tensor_shape(rule, [part.shape for part in parts]))


# -------------------------------------------------------------------------------------------- a whole table, checked


def tensors(table: Table) -> list[Tensor]:
    """The rules that carry parameters."""
    return [rule for rule in table if isinstance(rule, Tensor)]


def applicable(table: Table, tree: ParamTree) -> list[Rule]:
    """The table without `Tensor` rules whose parameters the model does not have (biases, an untied head ...)."""
    declared = dict(paths(tree))
    return [rule for rule in table if not isinstance(rule, Tensor) or all(path in declared for path in rule.paths)]


def _declared(rule: Tensor, tree: Mapping[str, Param]) -> list[Shape]:
    """Shapes of a rule's parameters without the axes of `each`."""
    shapes = []
    for path in rule.paths:
        shape, lead = tree[path].shape, tuple(len(numbers) for numbers in rule.each)
        if shape[: len(lead)] != lead:
            raise ValueError(f"table: {rule.name} counts {lead}, but {path} has shape {shape}; correct `each`")
        shapes.append(shape[len(lead) :])
    return shapes


def wanted(table: Table, tree: ParamTree) -> dict[str, Shape]:
    """Name -> shape of every tensor of a complete checkpoint. No array is made.

    Raises ValueError when the table leaves a parameter out, or carries one twice: an error in the family's file.
    """
    declared = dict(paths(tree))
    carried = [path for rule in tensors(table) for path in rule.paths]
    if sorted(carried) != sorted(declared):
        wrong = sorted(set(declared) ^ set(carried)) or sorted({p for p in carried if carried.count(p) > 1})
        raise ValueError(f"table: each parameter must be carried once; wrong are {wrong[:8]}")
    out = {}
    for rule in tensors(table):
        shape = tensor_shape(rule, _declared(rule, declared))
        out |= {rule.name.format(*numbers): shape for numbers in product(*rule.each)}
    return out


def match_names(table: Table, tree: ParamTree, found: Iterable[str], prefix: str) -> dict[str, str]:
    """The table's name -> the file's, for every tensor of a file; one that the table lacks keeps its own.

    A file saved from a model without its head lacks the prefix of the one with it, and the other way round; files of
    the first years call a norm's weight and bias gamma and beta.
    """

    def key(name: str) -> str:
        return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name.removeprefix(prefix)))

    known = [*wanted(table, tree), *(rule.name for rule in table if isinstance(rule, Alias))]
    by_key = {key(name): name for name in known}
    return {by_key.get(key(name), name): name for name in found}


def check(table: Table, tree: ParamTree, found: Mapping[str, Shape], owner: str) -> None:
    """Raise ValueError naming every missing, misshapen and extra tensor of `owner`, before anything is allocated."""
    want = wanted(table, tree)
    spare = {rule.name for rule in table if isinstance(rule, Alias)}
    unused = [rule.pattern for rule in table if isinstance(rule, Unused)]
    extra = [n for n in found if n not in want and n not in spare and not any(fnmatchcase(n, p) for p in unused)]
    lines = [f"missing: {name} {list(shape)}" for name, shape in want.items() if name not in found]
    lines += [
        f"misshapen: {name} must be {list(shape)}, found {list(found[name])}"
        for name, shape in want.items()
        if name in found and tuple(found[name]) != shape
    ]
    lines += [f"extra: {name} {list(found[name])}" for name in extra]
    if lines:
        more = f"\n  ... and {len(lines) - 12} more" if len(lines) > 12 else ""
        raise ValueError(
            f"{owner}: its tensors do not match its config:\n  " + "\n  ".join(lines[:12]) + more + "\n"
            "Use the config.json that belongs to these weights, or copy the weights again."
        )


# --------------------------------------------------------------------------------------------------- import, export

Read = Callable[[str], np.ndarray]
Index = tuple[tuple[int, int], ...]


def load(
    table: Table, tree: ParamTree, found: Mapping[str, Shape], read: Read, dtype: DTypeLike, shardings: Any = None
) -> Any:
    """Parameters from a checked checkpoint, one rule after the other and within it tensor by tensor.

    read: name -> array; called only for tensors of which this process holds a part.  shardings: a tree like `tree`, or
    None for the default device.  At any time the host holds one tensor and one parameter's local shards beside what
    is already placed.
    """
    declared, placed = dict(paths(tree)), dict(paths(shardings)) if shardings is not None else {}
    flat: dict[str, jax.Array] = {}
    for rule in tensors(table):
        flat |= _load_rule(rule, declared, read, np.dtype(dtype), placed)
    check_aliases(table, found, read)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: flat["/".join(key.key for key in path)], tree, is_leaf=lambda x: isinstance(x, Param)
    )


def check_aliases(table: Table, found: Mapping[str, Shape], read: Read) -> None:
    """Raise ValueError when a second copy of a parameter differs from the first."""
    for rule in table:
        if isinstance(rule, Alias) and rule.name in found:
            original = next(r.name for r in tensors(table) if r.paths == (rule.of,))
            if not np.array_equal(read(rule.name), read(original)):
                raise ValueError(
                    f"{rule.name} differs from {original}, though the config ties them; "
                    "set tie_word_embeddings=false if the head is its own, or remove the tensor"
                )


def _load_rule(
    rule: Tensor, declared: Mapping[str, Param], read: Read, dtype: np.dtype, placed: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
    inner = _declared(rule, declared)
    buffers = {path: _buffers(declared[path].shape, dtype, placed.get(path)) for path in rule.paths}
    indices = {index for shards in buffers.values() for index in shards}
    for where in product(*(range(len(numbers)) for numbers in rule.each)):
        if not any(_within(where, index) for index in indices):
            continue
        name = rule.name.format(*(numbers[i] for numbers, i in zip(rule.each, where, strict=True)))
        for path, part in zip(rule.paths, to_native(rule, read(name), inner), strict=True):
            for index, buffer in buffers[path].items():
                if _within(where, index):
                    offset = tuple(i - start for i, (start, _) in zip(where, index, strict=False))
                    buffer[offset] = part[tuple(slice(*ends) for ends in index[len(where) :])]
    return {path: _place(declared[path].shape, buffers[path], placed.get(path)) for path in rule.paths}


def _within(where: tuple[int, ...], index: Index) -> bool:
    return all(start <= i < stop for i, (start, stop) in zip(where, index, strict=False))


def _ends(index: Any, shape: Shape) -> Index:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _buffers(shape: Shape, dtype: np.dtype, sharding: Sharding | None) -> dict[Index, np.ndarray]:
    """Host memory for each distinct shard that this process holds."""
    if sharding is None:
        return {tuple((0, n) for n in shape): _aligned(shape, dtype)}
    local = {_ends(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}
    return {index: _aligned(tuple(stop - start for start, stop in index), dtype) for index in local}


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory on a 64-byte boundary, which jax on CPU takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _place(shape: Shape, buffers: Mapping[Index, np.ndarray], sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(next(iter(buffers.values())))
    return jax.make_array_from_callback(shape, sharding, lambda index: buffers[_ends(index, shape)])


def export(table: Table, params: Any, dtype: DTypeLike) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor, in the table's order, made as they are asked for.

    Quantised and adapted weights are exported dense. Parameters must be addressable by this process.
    """
    flat = dict(paths_of_weights(params))
    for rule in table:
        match rule:
            case Tensor():
                wholes = [np.asarray(dense(flat[path], dtype)) for path in rule.paths]
                for where in product(*(range(len(numbers)) for numbers in rule.each)):
                    numbers = [n[i] for n, i in zip(rule.each, where, strict=True)]
                    yield rule.name.format(*numbers), to_hf(rule, [whole[where] for whole in wholes])
            case Alias() | Unused():
                pass
            case other:
                assert_never(other)


def paths_of_weights(params: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, weight) of nested dicts; a quantised or adapted weight is one leaf."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from paths_of_weights(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value
