"""One training step: a pure function of (state, batch), jitted, its state donated.

    step = make_step(loss, optimizer, tree, runtime)
    state, metrics = step(state, batch)

Nothing here knows the model: a loss is any `loss(params, batch, key) -> (weighted mean, {"weight": ..., sums})`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from jaxllm.experiment import LossScale
from jaxllm.params import ParamTree, init, map_params, paths
from jaxllm.records import Batch, TrainState
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout, mesh_sizes, partition, shares, storage, storage_shardings, use
from jaxllm.train.moments import as_float32, is_table, map_moments, rounded
from jaxllm.train.scaling import counters, fresh_scale

Loss = Callable[[Any, Batch, Array], tuple[Float[Array, ""], dict[str, Array]]]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]

ROUNDING = 0x7FFFFFFF
"""Tells the key of a step's rounding from those of its dropout."""

# ----------------------------------------------------------------------------------------------------------- state


def init_state(
    tree: ParamTree, optimizer: optax.GradientTransformation, key: Key[Array, ""], scaling: LossScale | None = None
) -> TrainState:
    """A fresh state: masters as declared, the optimiser's state, and counters of skipped steps in `extra`.

    With `scaling` also "loss_scale", and "good_streak": finite steps since it last changed.
    """
    params = init(tree, key)
    step, skipped, streak = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: each is donated
    extra = {"skipped": skipped, "bad_streak": streak}
    return TrainState(step, params, optimizer.init(as_float32(params)), extra | fresh_scale(scaling))


def state_shardings(
    tree: ParamTree,
    optimizer: optax.GradientTransformation,
    runtime: Runtime,
    mesh: Mesh,
    scaling: LossScale | None = None,
) -> Any:
    """NamedSharding for every array of the state: masters and moments in the storage layout, the rest whole."""
    shapes = jax.eval_shape(lambda key: init_state(tree, optimizer, key, scaling), jax.random.key(0))
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: whole, shapes)
    layout = runtime.layout
    if layout is None:
        return shardings
    specs, host = _specs(tree, layout, mesh.shape), "pinned_host" if layout.offload else None
    moments = map_moments(
        lambda _, spec: NamedSharding(mesh, spec, memory_kind=host),
        shapes.opt_state,
        specs,
        mesh.shape,
        lambda _: whole,
    )
    return shardings.replace(params=storage_shardings(tree, layout, mesh), opt_state=moments)


def abstract_state(
    tree: ParamTree,
    optimizer: optax.GradientTransformation,
    runtime: Runtime,
    mesh: Mesh,
    scaling: LossScale | None = None,
) -> TrainState:
    """The state as ShapeDtypeStructs, each with its global shape and sharding, for lowering, restoring and planning."""
    shapes = jax.eval_shape(lambda key: init_state(tree, optimizer, key, scaling), jax.random.key(0))
    shardings = state_shardings(tree, optimizer, runtime, mesh, scaling)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def batch_sharding(runtime: Runtime, mesh: Mesh) -> NamedSharding:
    """Rows and their tokens over the layout's axes of batch and length. [B, T]."""
    if runtime.layout is None:
        return NamedSharding(mesh, PartitionSpec())
    least = shares(mesh.shape), mesh.shape["sequence"]
    return NamedSharding(mesh, partition(("batch", "length"), least, runtime.layout, mesh.shape))


def abstract_batch(rows: int, context: int, runtime: Runtime, mesh: Mesh) -> Batch:
    """A batch [rows, context] as ShapeDtypeStructs with shardings."""
    where = batch_sharding(runtime, mesh)
    ints: Any = jax.ShapeDtypeStruct((rows, context), jnp.int32, sharding=where)
    weight: Any = jax.ShapeDtypeStruct((rows, context), jnp.float32, sharding=where)
    return Batch(ints, ints, weight, ints, ints, ints)


# ------------------------------------------------------------------------------------------------------------ step


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    tree: ParamTree,
    runtime: Runtime,
    *,
    accumulate: int = 1,
    seed: int = 0,
    scaling: LossScale | None = None,
    layer_norms: bool = False,
    learning_rate: optax.Schedule = lambda step: jnp.nan,
    advance: Callable[[Any, dict[str, Array]], Any] = lambda params, aux: params,
) -> Step:
    """A jitted step whose state is donated. Call it under `jax.set_mesh` when the runtime has a layout.

    accumulate: micro-batches per step, weighted by their token counts, so that they add up to the big batch [B, T].
    A step whose loss or gradient is not finite changes nothing but `step` and the counters in `extra`.
    scaling: of the loss, for a state that was made with it.
    advance: what else moves weights after the optimiser, given the loss's aux (corrections of routers).
    layer_norms: report every parameter's gradient norm as "grad_norm/<path>".

    metrics: loss, grad_norm, learning_rate, skipped, bad_streak, each [], and the sums in the loss's aux.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One batch [B, T]."""
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        scale = state.extra["loss_scale"] if scaling is not None else None
        mean, aux, grads = gradients(loss, tree, state.params, batch, key, runtime, accumulate, scale)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(mean)
        state = replace(state, opt_state=_moved(state.opt_state, tree, runtime, jax.memory.Space.Device))
        masters = as_float32(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, masters)
        params = advance(optax.apply_updates(masters, updates), aux)
        params = rounded(tree, params, jax.random.fold_in(key, ROUNDING))

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        extra = state.extra | counters(state.extra, good, scaling)
        new = TrainState(state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state), extra)
        new = _pinned(new, tree, runtime)
        new = replace(new, opt_state=_moved(new.opt_state, tree, runtime, jax.memory.Space.Host))
        metrics = {"loss": mean, "grad_norm": norm, "learning_rate": learning_rate(state.step), **extra, **aux}
        if layer_norms:
            metrics |= {f"grad_norm/{path}": jnp.linalg.norm(g.ravel()) for path, g in paths(grads)}
        return new, metrics

    return jax.jit(step, donate_argnums=0)


def compiled(step: Step, state: TrainState, batch: Batch) -> Step:
    """The step's program for these shapes, dtypes and shardings, compiled before the first step is timed.

    Called with others it raises TypeError or ValueError that names the argument, where `jax.jit` would compile again.
    """
    return step.lower(state, batch).compile()  # type: ignore[attr-defined]


def gradients(
    loss: Loss,
    tree: ParamTree,
    params: Any,
    batch: Batch,
    key: Array,
    runtime: Runtime,
    accumulate: int,
    scale: Array | None = None,
) -> tuple[Float[Array, ""], dict[str, Array], Any]:
    """(weighted mean loss, summed aux, fp32 gradients in the storage layout) over all micro-batches.

    ZeRO stages 1 and 2 gather one compute-dtype copy of the weights here, once for all micro-batches, and differentiate
    with respect to it. Tables stay fp32 and sharded: a lookup's gradient adds up thousands of rows for a common token,
    which the compute dtype would lose, and neither the lookup nor the chunked loss needs them whole. Where there are
    stages, each gathers what it holds in the forward (`nn/pipeline.py`), and layers outside are gathered one by one.
    scale: what the mean loss of a micro-batch is multiplied by before it is differentiated, [].
    """
    layout = runtime.layout
    if layout is not None and layout.zero in (1, 2) and layout.stage == 1 and mesh_sizes():
        gathered = use(tree, params, layout, runtime.compute_dtype)
        params = map_params(lambda p, whole, master: master if is_table(p) else whole, tree, gathered, params)

    def total(params: Any, batch: Batch, key: Array) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        mean, aux = loss(params, batch, key)
        weight = jax.lax.stop_gradient(aux["weight"])
        return mean * (weight if scale is None else scale), (mean * weight, aux)

    def micro(batch: Batch, key: Array) -> tuple[Array, dict[str, Array], Any]:
        (_, (value, aux)), grads = jax.value_and_grad(total, has_aux=True)(params, batch, key)
        grads = _stored(tree, grads, runtime)
        if scale is not None:
            grads = jax.tree.map(lambda g: g * (aux["weight"] / scale), grads)
        return value, aux, grads

    if accumulate == 1:
        value, aux, grads = micro(batch, key)
    else:
        value, aux, grads = _accumulated(micro, batch, key, accumulate)
    weight = jnp.maximum(aux["weight"], 1e-9)
    return value / weight, aux, jax.tree.map(lambda g: g / weight, grads)


def deal(batch: Batch, accumulate: int) -> Batch:
    """Micro-batches [accumulate, B / accumulate, T]. Rows are dealt out in turn, so that no row changes its device."""
    return jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)


def _accumulated(micro: Any, batch: Batch, key: Array, accumulate: int) -> Any:
    """The sum of `micro` over micro-batches, dealt out as [accumulate, rows, T]."""
    dealt = deal(batch, accumulate)
    keys = jax.random.split(key, accumulate)
    shapes = jax.eval_shape(micro, jax.tree.map(lambda x: x[0], dealt), keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: Any, x: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, micro(*x)), None

    return jax.lax.scan(add, zeros, (dealt, keys))[0]


def _specs(tree: ParamTree, layout: Layout, sizes: Mapping[str, int]) -> Any:
    return map_params(lambda p: storage(p, layout, sizes), tree)


def _moved(opt_state: Any, tree: ParamTree, runtime: Runtime, to: Any) -> Any:
    """The optimiser's state with its moments in this memory (`jax.memory.Space`), where the layout offloads them."""
    layout, sizes = runtime.layout, mesh_sizes()
    if layout is None or not layout.offload:
        return opt_state
    return map_moments(
        lambda x, _: jax.device_put(x, to), opt_state, _specs(tree, layout, sizes), sizes, others=lambda x: x
    )


def _pinned(state: TrainState, tree: ParamTree, runtime: Runtime) -> TrainState:
    """The state with masters and moments in the storage layout: where it lives must not be XLA's choice."""
    layout, sizes = runtime.layout, mesh_sizes()
    if layout is None or not sizes:
        return state
    specs, pin = _specs(tree, layout, sizes), jax.lax.with_sharding_constraint
    moments = map_moments(pin, state.opt_state, specs, sizes, others=lambda x: x)
    return replace(state, params=jax.tree.map(pin, state.params, specs), opt_state=moments)


def _stored(tree: ParamTree, grads: Any, runtime: Runtime) -> Any:
    """Gradients as fp32 in the storage layout, each of its parameter's shape."""
    sizes = mesh_sizes()
    if runtime.layout is None or not sizes:
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    layout = runtime.layout
    return map_params(
        lambda p, g: jax.lax.with_sharding_constraint(g, storage(p, layout, sizes)).astype(jnp.float32), tree, grads
    )
