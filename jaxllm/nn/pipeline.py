"""Stages: devices that hold different layers of a stack, and micro-batches that travel through them.

A circular schedule (GPipe, Huang et al. 2019; groups: Narayanan et al. 2021, §2.2). Of S stages each holds G groups of
K adjacent layers, group g of stage s being number g S + s; M >= S micro-batches go around the ring of stages G times.
All stages work at every turn of one scan and then hand on what they have made. Of the turns, G M + S - 1, a stage idles

    (S - 1) / (G M + S - 1)

Unusual: what is outside of the pipeline (embedding, head, loss, and layers that are left over) is not repeated on
every stage, nor given to one of them: there, the stages are one more axis that rows are dealt over. So layers need not
divide by S G: the remainder, first in their stack, is run by all devices on their own rows, as are whole stacks of
fewer layers than S G (the dense ones before the experts). No stage has more to do than another, and nothing is padded.
61 layers, 3 dense and 58 of experts, on 4 stages: 3 and 2 outside, 14 on each stage.

The axes of stages and rows (but experts') are manual in here, so that a gradient is summed over rows once per forward,
not at every turn; what is left of the mesh is the compiler's, as outside. From ZeRO stage 1 on a stage's weights are
gathered over rows once per forward too, in the compute dtype; their gradients add up in float32 and are scattered.
Weights never travel from stage to stage, but for those of stacks that do not divide, or lie in several groups: these
are stored over stages along another axis than their number, and change places (all-to-alls) once per forward.

Dropout is drawn by turn and stage: not the masks that one device draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxllm import leaves
from jaxllm.config import Stack
from jaxllm.nn.attend import Given
from jaxllm.nn.moe import averaged
from jaxllm.nn.position import Tables
from jaxllm.params import Param, ParamTree, layer, map_params
from jaxllm.sharding import DATA, Layout, constrain, mesh_sizes, names_of, partition, row_unit, storage

Layers = Callable[[Any, Stack, Array, Given], tuple[Array, list[Any]]]
Run = Callable[[Any, Array | int, Array, Given], tuple[Array, list[Any]]]
"""Of weights [G, K, ...], the number of a group, x [b, T, D] and what belongs to it."""


def staged_layers(repeats: int, layout: Layout | None) -> int:
    """How many of a stack's repeats go through the pipeline: the most that divide, the others come before them."""
    if layout is None or mesh_sizes().get("stage", 1) == 1 or not layout.mesh_axes("layers"):
        return 0
    return repeats - repeats % (layout.stage * layout.groups)


def require_stages(stacks: tuple[Stack, ...], layout: Layout) -> None:
    """Raise ValueError when no stack has a layer for every group of every stage."""
    most, least = max(stack.repeats for stack in stacks), layout.stage * layout.groups
    if layout.stage > 1 and most < least:
        raise ValueError(
            f"layout: stage={layout.stage} x groups={layout.groups} must be at most the repeats of some stack of the "
            f"model, which has {most}; set stage={most} or less, or fewer groups"
        )


def _row_axes(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes of rows that are manual in the pipeline, beside `stage`."""
    return tuple(a for a in ("replica", *DATA) if sizes[a] > 1)


# ---------------------------------------------------------------------------------------------------------- weights


class Place(NamedTuple):
    """Where a stacked array lies, as [G, S, K, ...], and what is done to it. gathered: mesh axes, by dimension."""

    stored: PartitionSpec
    whole: PartitionSpec
    gathered: tuple[tuple[str, ...], ...]
    dtype: Any


def over_stages(tree: ParamTree, params: Any, layout: Layout, dtype: DTypeLike) -> tuple[Any, Any]:
    """Stacked weights [L, ...] as [R, G, S, K, ...], a copy for each of R shares of rows; and zeros of these shapes.

    tree: declares one layer.  The gradient of the weights is that of the zeros, which are float32 (`_stands_for`).
    """
    sizes = mesh_sizes()
    places = map_params(lambda p, w: _places(p, w, layout, sizes, dtype), tree, params)
    rows = _row_axes(sizes) or None
    arrays, structure = jax.tree.flatten(params)
    how: list[Place] = jax.tree.leaves(places, is_leaf=lambda x: isinstance(x, Place))
    grouped = [
        lax.with_sharding_constraint(x.reshape(layout.groups, sizes["stage"], -1, *x.shape[1:]), place.stored)
        for x, place in zip(arrays, how, strict=True)
    ]
    out = [PartitionSpec(rows, *place.whole) for place in how]

    def run(xs: list[Array]) -> tuple[list[Array], list[Array]]:
        made: list[Any] = [_gathered(place.gathered, place.dtype, x) for x, place in zip(xs, how, strict=True)]
        return [w[None] for w, _ in made], [z[None] for _, z in made]

    gather = jax.shard_map(run, in_specs=([p.stored for p in how],), out_specs=(out, out), check_vma=False)
    weights, zeros = gather(grouped)
    return jax.tree.unflatten(structure, weights), jax.tree.unflatten(structure, zeros)


def _places(p: Param, w: leaves.Weight, layout: Layout, sizes: Mapping[str, int], dtype: DTypeLike) -> Any:
    inside = {axis: n for axis, n in sizes.items() if axis != "stage"}

    def array(x: Array, axes: tuple[str | None, ...]) -> Place:
        whole = partition(axes[1:], x.shape[1:], layout, inside)
        stored = storage(p, layout, inside) if axes[1:] == p.axes else whole
        more = tuple(
            tuple(a for a in names_of(has) if a not in names_of(keeps))
            for has, keeps in zip(stored, whole, strict=True)
        )
        fixed = p.exact or axes[1:] != p.axes or not jnp.issubdtype(x.dtype, jnp.floating)
        first = None, "stage", None
        of_dims = ((), (), (), *more)
        specs = PartitionSpec(*first, *stored), PartitionSpec(*first, *whole)
        return Place(*specs, of_dims, x.dtype if fixed else dtype)

    return leaves.map_arrays(array, w, ("layers", *p.axes), outputs=p.outputs)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(axes: tuple[tuple[str, ...], ...], dtype: DTypeLike, x: Array) -> tuple[Array, Array]:
    """x in `dtype`, gathered over these mesh axes by dimension, the minor first; and float32 zeros of its shape."""
    x = x.astype(dtype)
    for dim, names in enumerate(axes):
        for name in reversed(names):
            x = lax.all_gather(x, name, axis=dim, tiled=True)
    return x, jnp.zeros(x.shape, jnp.float32)


def _gathered_fwd(axes: Any, dtype: DTypeLike, x: Array) -> tuple[tuple[Array, Array], Any]:
    return _gathered(axes, dtype, x), np.zeros((0,), x.dtype)


def _gathered_bwd(axes: Any, dtype: DTypeLike, like: Any, g: tuple[Array, Array]) -> tuple[Any]:
    if not jnp.issubdtype(like.dtype, jnp.floating):
        return (None,)
    of_zeros = g[1]
    for dim, names in enumerate(axes):
        for name in names:
            of_zeros = lax.psum_scatter(of_zeros, name, scatter_dimension=dim, tiled=True)
    return (of_zeros.astype(like.dtype),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


@jax.custom_vjp
def _stands_for(w: Array, zero: Array) -> Array:
    """w, whose gradient goes to `zero` in float32: turns of a scan that each round theirs would lose what is small."""
    return w


_stands_for.defvjp(lambda w, zero: (w, None), lambda _, g: (jnp.zeros_like(g), g.astype(jnp.float32)))


def group_of(weights: Any, g: Array | int) -> Any:
    """The layers [K, ...] of a group of a stage's weights (`over_stages`)."""

    def one(w: Array, zero: Array) -> Array:
        return _stands_for(w, zero) if jnp.issubdtype(w.dtype, jnp.floating) else w

    return jax.tree.map(one, *layer(weights, g))


# ------------------------------------------------------------------------------------------------------------- rows


class Rows(NamedTuple):
    """What belongs to rows, an array [B, ...] each, but for positions, which may have axes before."""

    position: Any  # int32 [..., B, T]
    others: Any  # inputs without positions, rotations, keys and values that layers share


def _split(given: Given) -> tuple[Rows, Any]:
    """What belongs to rows, and what does not: a bias table and the key of dropout."""
    inputs = replace(given.inputs, tokens_BT=None, embeds_BTD=None, position_BT=None)
    rows = Rows(given.inputs.position_BT, (inputs, given.tables.rotations, given.shared))
    return rows, (given.tables.bias_RN, given.key)


def _joined(given: Given, rows: Rows, fixed: Any) -> Given:
    inputs, rotations, shared = rows.others
    inputs = replace(inputs, position_BT=rows.position)
    return given._replace(inputs=inputs, tables=Tables(rotations, fixed[0]), key=fixed[1], shared=shared)


def _deal(x: Array, dim: int, parts: int, layout: Layout) -> Float[Array, "M ..."]:
    """[M, ..., b, ...] of [..., B, ...], rows dealt out in turn, so that no row changes its device."""
    x = constrain(x, (*[None] * dim, "batch", *[None] * (x.ndim - dim - 1)), layout)
    return jnp.moveaxis(x.reshape(*x.shape[:dim], -1, parts, *x.shape[dim + 1 :]), dim + 1, 0)


def _deal_rows(rows: Rows, parts: int, layout: Layout) -> Rows:
    position = _deal(rows.position, rows.position.ndim - 2, parts, layout)
    return Rows(position, jax.tree.map(lambda x: _deal(x, 0, parts, layout), rows.others))


def _shares(rows: Rows, parts: int, over: tuple[str, ...]) -> Float[Array, " M"]:
    """What share of all real tokens each part has here."""
    segment_BT = rows.others[0].segment_BT
    real_BT = jnp.ones((parts, 1)) if segment_BT is None else segment_BT > 0
    real_M = real_BT.reshape(-1, parts, real_BT.shape[1]).sum((0, 2))
    return real_M / jnp.maximum(lax.psum(real_M.sum(), over), 1)


# --------------------------------------------------------------------------------------------------------- schedule


def through_stages(
    layers: Layers,
    remat: Callable[[Any], Any],
    tree: ParamTree,
    params: Any,
    cfg: Stack,
    x_BTD: Float[Array, "B T D"],
    given: Given,
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """What `layers` gives for all of a stack's layers [L, ...]; those that are left over come first, and see no stage.

    layers: (params, stack, x, given) -> (x, outputs by place).  remat: what the runtime does to a layer.
    tree: declares one layer.  Raises ValueError when the rows do not divide into micro-batches on this mesh.
    """
    layout = given.runtime.layout
    assert layout is not None, "only called where there are stages"
    staged = staged_layers(cfg.repeats, layout)
    alone, out = cfg.repeats - staged, None
    if alone:
        x_BTD, out = layers(jax.tree.map(lambda w: w[:alone], params), replace(cfg, repeats=alone), x_BTD, given)
        params = jax.tree.map(lambda w: w[alone:], params)
    weights = over_stages(tree, params, layout, given.runtime.compute_dtype)
    run = partial(_group, layers, remat, replace(cfg, repeats=staged // (layout.stage * layout.groups)))
    x_BTD, experts = _schedule(run, weights, x_BTD, given, layout)
    piped = [(None, {}, found) for found in experts]
    return x_BTD, piped if out is None else jax.tree.map(lambda *xs: jnp.concatenate(xs), out, piped)


def _group(
    layers: Layers, remat: Any, cfg: Stack, weights: Any, g: Array | int, x_BTD: Float[Array, "B T D"], given: Given
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """One of the groups of layers on a stage: x, and the statistics of experts.

    Of several groups each is recomputed as one: layer by layer, every turn would keep a copy of its group's weights.
    """
    runtime, several = given.runtime, isinstance(g, Array)
    inside = given._replace(runtime=replace(runtime, remat="none", offload=()) if several else runtime)

    def run(weights: Any, g: Array | int, x: Array) -> tuple[Array, list[Any]]:
        x, out = layers(group_of(weights, g), cfg, x, inside)
        return x, [experts for _, _, experts in out]

    return (remat(run) if several else run)(weights, g, x_BTD)


def _schedule(
    run: Run, weights: Any, x_BTD: Float[Array, "B T D"], given: Given, layout: Layout
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """x after all staged layers, and per place of the pattern the statistics of experts [L, ...].

    weights: of `over_stages`.  run: one group of all [G, K, ...], by its number, on the rows it is given.
    Raises ValueError when the rows do not divide into micro-batches on this mesh.
    """
    sizes = mesh_sizes()
    unit, over = row_unit(layout, sizes), _row_axes(sizes)
    if len(x_BTD) % unit:
        raise ValueError(
            f"layout: rows of a forward, {len(x_BTD)}, must be a multiple of {unit}, for stage={layout.stage} and "
            f"microbatches={layout.parts}; the next that is: {-(-len(x_BTD) // unit) * unit}"
        )
    rows, fixed = _split(given)
    own = partition(("batch", "stream", None), x_BTD.shape, layout, sizes)
    inside = partition(("batch", "stream", None), x_BTD.shape, layout, {**sizes, "stage": 1})
    copies = PartitionSpec("stage", *inside)  # a copy of the rows for every stage
    of_rows, whole = PartitionSpec(over or None), PartitionSpec()
    of_stage = PartitionSpec("stage", over or None)
    of_weights = PartitionSpec(over or None, None, "stage")
    position = PartitionSpec(*[None] * (rows.position.ndim - 2), over or None)
    schedule = jax.shard_map(
        partial(_turns, run, given, layout, over),
        in_specs=(of_weights, of_stage, Rows(position, of_rows), whole),
        out_specs=(of_stage, PartitionSpec(None, "stage")),
        axis_names={"stage", *over},
        check_vma=False,
    )
    x = jax.shard_map(_to_all, in_specs=own, out_specs=copies, check_vma=False)(x_BTD)
    y, stats = schedule(weights, x, rows, fixed)
    y_BTD = jax.shard_map(_from_first, in_specs=copies, out_specs=own, check_vma=False)(y)
    return y_BTD, jax.tree.map(lambda s: s.reshape(-1, *s.shape[3:]), stats)


def _to_all(x_BTD: Float[Array, "B T D"]) -> Float[Array, "1 SB T D"]:
    """The rows of all stages on each."""
    return lax.all_gather(x_BTD, "stage", axis=0, tiled=True)[None]


def _from_first(y: Float[Array, "1 SB T D"]) -> Float[Array, "B T D"]:
    """Each stage's own rows of those that the first has."""
    first = jnp.where(lax.axis_index("stage") == 0, y[0], 0)
    return lax.psum_scatter(first, "stage", scatter_dimension=0, tiled=True)


def _turns(
    run: Run,
    given: Given,
    layout: Layout,
    over: tuple[str, ...],
    weights: Any,
    x: Float[Array, "1 B T D"],
    rows: Rows,
    fixed: Any,
) -> tuple[Float[Array, "1 B T D"], list[Any]]:
    """What one stage does for its share of rows; the first one has the result. over: mesh axes of the shares."""
    S, M, G = layout.stage, layout.parts, layout.groups
    s, ring = lax.axis_index("stage"), [(i, (i + 1) % S) for i in range(S)]
    weights = jax.tree.map(lambda w: w[0, :, 0], weights)
    parts, of_parts = _deal(x[0], 0, M, layout), _deal_rows(rows, M, layout)
    bias, key = fixed
    key = None if key is None else jax.random.fold_in(key, lax.axis_index((*over, "stage")))

    def turn(carry: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], Any]:
        """The first stage takes a part from its buffer, others what has come; what comes back to it goes there."""
        buffer, came = carry
        m, g = (t - s) % M, jnp.clip((t - s) // M, 0, G - 1)
        h = jnp.where(s == 0, layer(buffer, t % M), came)
        own = None if key is None else jax.random.fold_in(key, t)
        h, stats = run(weights, 0 if G == 1 else g, h, _joined(given, layer(of_parts, m), (bias, own)))
        came = lax.ppermute(h, "stage", ring)
        back = (t - S + 1) % M
        buffer = buffer.at[back].set(jnp.where(t >= S - 1, came, buffer[back]))
        return (buffer, came), stats

    # what stages do before anything has come to them counts for nothing, but should be finite: hence a real part
    (buffer, _), stats = lax.scan(turn, (parts, parts[0]), jnp.arange(G * M + S - 1))
    share_M = _shares(rows, M, over)
    mine = jax.tree.map(lambda z: lax.dynamic_slice_in_dim(z, s, G * M).reshape(G, M, *z.shape[1:]), stats)
    found = [{name: z[:, None] for name, z in averaged(place, share_M, over).items()} for place in mine]
    return buffer.swapaxes(0, 1).reshape(x.shape), found
