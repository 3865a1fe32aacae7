"""One training step: a pure function of (state, batch), jitted, its state donated.

    step = make_step(loss, optimizer, tree, runtime)
    state, metrics = step(state, batch)

Nothing here knows the model: a loss is any `loss(params, batch, key) -> (weighted mean, {"weight": ..., sums})`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from jaxllm.params import Param, ParamTree, init, map_params, paths
from jaxllm.records import Batch, TrainState
from jaxllm.runtime import Runtime
from jaxllm.sharding import mesh_sizes, partition, shares, storage, storage_shardings, use

Loss = Callable[[Any, Batch, Array], tuple[Float[Array, ""], dict[str, Array]]]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]

# ----------------------------------------------------------------------------------------------------------- state


def init_state(tree: ParamTree, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> TrainState:
    """A fresh state: fp32 masters, the optimiser's state, and counters of skipped steps in `extra`."""
    params = init(tree, key)
    step, skipped, streak = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: each is donated
    return TrainState(step, params, optimizer.init(params), {"skipped": skipped, "bad_streak": streak})


def state_shardings(tree: ParamTree, optimizer: optax.GradientTransformation, runtime: Runtime, mesh: Mesh) -> Any:
    """NamedSharding for every array of the state: masters and moments in the storage layout, the rest whole."""
    shapes = jax.eval_shape(lambda key: init_state(tree, optimizer, key), jax.random.key(0))
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: whole, shapes)
    if runtime.layout is None:
        return shardings
    params = storage_shardings(tree, runtime.layout, mesh)
    kind = "pinned_host" if runtime.layout.offload else None
    moments = optax.tree_map_params(
        optimizer,
        lambda _, s: s.with_memory_kind(kind),
        shapes.opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    return shardings.replace(params=params, opt_state=moments)


def abstract_state(
    tree: ParamTree, optimizer: optax.GradientTransformation, runtime: Runtime, mesh: Mesh
) -> TrainState:
    """The state as ShapeDtypeStructs, each with its global shape and sharding, for lowering, restoring and planning."""
    shapes = jax.eval_shape(lambda key: init_state(tree, optimizer, key), jax.random.key(0))
    shardings = state_shardings(tree, optimizer, runtime, mesh)
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
    layer_norms: bool = False,
    learning_rate: optax.Schedule = lambda step: jnp.nan,
    advance: Callable[[Any, dict[str, Array]], Any] = lambda params, aux: params,
) -> Step:
    """A jitted step whose state is donated. Call it under `jax.set_mesh` when the runtime has a layout.

    accumulate: micro-batches per step, weighted by their token counts, so that they add up to the big batch [B, T].
    A step whose loss or gradient is not finite changes nothing but `step` and the counters in `extra`.
    advance: what else moves weights after the optimiser, given the loss's aux (corrections of routers).
    layer_norms: report every parameter's gradient norm as "grad_norm/<path>".

    metrics: loss, grad_norm, learning_rate, skipped, bad_streak, each [], and the sums in the loss's aux.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One batch [B, T]."""
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mean, aux, grads = gradients(loss, tree, state.params, batch, key, runtime, accumulate)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(mean)
        state = replace(state, opt_state=_moved(optimizer, state.opt_state, runtime, jax.memory.Space.Device))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = advance(optax.apply_updates(state.params, updates), aux)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        extra = state.extra | {
            "skipped": state.extra["skipped"] + ~good,
            "bad_streak": jnp.where(good, 0, state.extra["bad_streak"] + 1),
        }
        new = TrainState(state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state), extra)
        new = _pinned(new, tree, optimizer, runtime)
        new = replace(new, opt_state=_moved(optimizer, new.opt_state, runtime, jax.memory.Space.Host))
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
    loss: Loss, tree: ParamTree, params: Any, batch: Batch, key: Array, runtime: Runtime, accumulate: int
) -> tuple[Float[Array, ""], dict[str, Array], Any]:
    """(weighted mean loss, summed aux, fp32 gradients in the storage layout) over all micro-batches.

    ZeRO stages 1 and 2 gather one compute-dtype copy of the weights here, once for all micro-batches, and differentiate
    with respect to it. Tables stay fp32 and sharded: a lookup's gradient adds up thousands of rows for a common token,
    which the compute dtype would lose, and neither the lookup nor the chunked loss needs them whole. Where there are
    stages, each gathers what it holds in the forward (`nn/pipeline.py`), and layers outside are gathered one by one.
    """
    layout = runtime.layout
    if layout is not None and layout.zero in (1, 2) and layout.stage == 1 and mesh_sizes():
        gathered = use(tree, params, layout, runtime.compute_dtype)
        params = map_params(lambda p, whole, master: master if _is_table(p) else whole, tree, gathered, params)

    def total(params: Any, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        mean, aux = loss(params, batch, key)
        return mean * jax.lax.stop_gradient(aux["weight"]), aux

    def micro(batch: Batch, key: Array) -> tuple[Array, dict[str, Array], Any]:
        (value, aux), grads = jax.value_and_grad(total, has_aux=True)(params, batch, key)
        return value, aux, _stored(tree, grads, runtime)

    if accumulate == 1:
        value, aux, grads = micro(batch, key)
    else:
        value, aux, grads = _accumulated(micro, batch, key, accumulate)
    weight = jnp.maximum(aux["weight"], 1e-9)
    return value / weight, aux, jax.tree.map(lambda g: g / weight, grads)


def _is_table(p: Param) -> bool:
    """Whether a parameter is looked up by row: embeddings, and the head that shares their shape."""
    return p.axes[0] in ("vocab", "positions") and len(p.axes) == 2


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


def _moved(optimizer: optax.GradientTransformation, opt_state: Any, runtime: Runtime, to: Any) -> Any:
    """The optimiser's state with its moments in this memory (`jax.memory.Space`), where the layout offloads them."""
    if runtime.layout is None or not runtime.layout.offload:
        return opt_state
    return optax.tree_map_params(optimizer, lambda x: jax.device_put(x, to), opt_state)


def _pinned(
    state: TrainState, tree: ParamTree, optimizer: optax.GradientTransformation, runtime: Runtime
) -> TrainState:
    """The state with masters and moments in the storage layout: where it lives must not be XLA's choice."""
    layout, sizes = runtime.layout, mesh_sizes()
    if layout is None or not sizes:
        return state
    specs, pin = map_params(lambda p: storage(p, layout, sizes), tree), jax.lax.with_sharding_constraint
    moments = optax.tree_map_params(optimizer, pin, state.opt_state, specs)
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
