"""Dropless mixtures: tokens sorted by expert and multiplied group by group, on one device or to experts' devices.

Unusual: the exchange between the devices of the `expert` axis has room for `layout.spare` times a balanced load per
pair of devices, not for the worst case. What does not fit goes in another round of the same program, so that nothing is
dropped and a balanced router pays for one round. A round is a pure function of its number; the backward pass runs the
same loop and computes a round once more before it goes through it (as full rematerialisation would).

M = B T k choices of a device, X devices, C rows of room for each of them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.config import GLU, MoE
from jaxllm.kernels.grouped import grouped_matmul
from jaxllm.leaves import dense
from jaxllm.nn.ffn import activate
from jaxllm.params import ParamTree, map_params
from jaxllm.remat import Name, named
from jaxllm.runtime import Runtime
from jaxllm.sharding import axes_in, copies, mesh_sizes, partition


def grouped(
    p: Any,
    cfg: MoE,
    tree: ParamTree,
    x_BTD: Float[Array, "B T D"],
    choices: tuple[Int[Array, "B T k"], Float[Array, "B T k"]],
    runtime: Runtime,
) -> Float[Array, "B T D"]:
    """sum over a token's choices of weight * expert(x). choices: experts and weights.  tree: declares p.

    On a mesh every device sorts its own tokens; where it holds a slice of F, results are summed over the slices; where
    it holds a share of the experts, tokens go to theirs and come back.
    """
    layout, sizes = runtime.layout, mesh_sizes()
    p = map_params(lambda _, w: dense(w, x_BTD.dtype), tree, p)
    if layout is None or not sizes:
        return _by_token(_alone(p, cfg, x_BTD, *choices), choices[0])
    slices = map_params(lambda q: partition(q.axes, q.shape, layout, sizes), tree)
    rows, out = (partition(("batch", length, None), x_BTD.shape, layout, sizes) for length in ("length", "stream"))
    experts, over, _ = slices["down"]["kernel"]
    scattered = over is not None and out != rows  # a sum over tensor that ends split along T

    def run(own: Any, x: Array, expert: Array, weight: Array) -> Float[Array, "B T D"]:
        p = jax.tree.map(lambda w: w[0, 0], own)
        if over is not None and "bias" in p["down"]:  # added once
            first = lax.axis_index(over) == 0
            p = p | {"down": p["down"] | {"bias": jnp.where(first, p["down"]["bias"], 0.0)}}
        if experts is None:
            y_MD: Any = _alone(p, cfg, x, expert, weight)
        else:
            how = Exchange(cfg, experts, sizes[experts], room(layout.spare, expert.size, sizes[experts]))
            plan = _plan(how, expert)
            y_MD = _exchanged(how, p, x.reshape(-1, x.shape[2]), weight.reshape(-1)[plan.order], plan)
        y = _by_token(y_MD, expert)
        if scattered:
            return lax.psum_scatter(y, over, scatter_dimension=1, tiled=True)
        return y if over is None else lax.psum(y, over)

    end = out if scattered else rows
    made = map_params(lambda q, w: copies(q, w, axes_in(rows), layout), tree, p)
    own, specs = (map_params(lambda _, both, i=i: both[i], tree, made) for i in range(2))
    split = jax.shard_map(run, in_specs=(specs, rows, rows, rows), out_specs=end, check_vma=False)
    return split(own, x_BTD, *choices)


def _by_token(y_MD: Float[Array, "M D"], expert_BTk: Int[Array, "B T k"]) -> Float[Array, "B T D"]:
    """Results of choices sorted by expert, summed by token."""
    order_M = jnp.argsort(expert_BTk.reshape(-1), stable=True)
    summed: Any = _summed(expert_BTk.shape[2], y_MD, order_M)
    return summed.reshape(*expert_BTk.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(k: int, y_MD: Float[Array, "M D"], order_M: Int[Array, " M"]) -> Float[Array, "BT D"]:
    """The k sorted rows of every token, summed in float32. Its gradient is gathered; XLA's own would be scattered."""
    place = jnp.argsort(order_M).reshape(-1, k)
    return sum(y_MD[place[:, i]].astype(jnp.float32) for i in range(k)).astype(y_MD.dtype)  # type: ignore[union-attr]


_summed.defvjp(lambda k, y, order: (_summed(k, y, order), order), lambda k, order, g: (g[order // k], None))


def _alone(
    p: Any, cfg: MoE, x_BTD: Float[Array, "B T D"], expert_BTk: Int[Array, "B T k"], weight_BTk: Float[Array, "B T k"]
) -> Float[Array, "M D"]:
    """Weighted results of all choices, sorted by expert, from experts that are all here."""
    order_M = jnp.argsort(expert_BTk.reshape(-1), stable=True)
    expert_M, weight_M = (x.reshape(-1)[order_M] for x in (expert_BTk, weight_BTk))
    size_E = jnp.bincount(expert_M, length=cfg.experts).astype(jnp.int32)
    x_MD = x_BTD.reshape(-1, x_BTD.shape[2])[order_M // cfg.router.top_k]
    y_MD = _experts(p, cfg, x_MD, expert_M, size_E)
    return y_MD * weight_M[:, None].astype(y_MD.dtype)


def _experts(
    p: Any, cfg: MoE, x_MD: Float[Array, "M D"], expert_M: Int[Array, " M"], size_E: Int[Array, " E"]
) -> Float[Array, "M D"]:
    """Every row through its expert. Rows lie expert by expert; those past the last group give whatever they give."""

    def per_expert(name: Name, x: Array) -> Array:
        y = grouped_matmul(x, p[name]["kernel"], size_E)
        return named(y + p[name]["bias"][expert_M] if "bias" in p[name] else y, name)

    gate = per_expert("gate", x_MD) if isinstance(cfg.expert, GLU) else None
    return per_expert("down", activate(cfg.expert, per_expert("up", x_MD), gate))


# --------------------------------------------------------------------------------------------------------- exchange


class Exchange(NamedTuple):
    """What is static. axis: the mesh axis, of `size` devices.  room: rows per pair of devices and round."""

    cfg: MoE
    axis: str
    size: int
    room: int


class Plan(NamedTuple):
    """Who sends what. int32.

    order: choices sorted by expert.  expert: of each sorted choice.  count, start: choices that go to each device, and
    where they begin in that order.  came: how many come from each device for each expert here.  rounds: until the
    device with the most to send to another has sent it; the same on all devices.
    """

    order: Int[Array, " M"]
    expert: Int[Array, " M"]
    count: Int[Array, " X"]
    start: Int[Array, " X"]
    came: Int[Array, "X e"]
    rounds: Int[Array, ""]


def room(spare: float, choices: int, devices: int) -> int:
    """Rows for one pair of devices: `spare` times a balanced load, in eights, at most all of a device's choices."""
    return min(choices, 8 * math.ceil(spare * choices / devices / 8))


def _plan(how: Exchange, expert_BTk: Int[Array, "B T k"]) -> Plan:
    order = jnp.argsort(expert_BTk.reshape(-1), stable=True)
    expert = expert_BTk.reshape(-1)[order]
    sent = jnp.bincount(expert, length=how.cfg.experts).astype(jnp.int32).reshape(how.size, -1)
    came = lax.all_to_all(sent, how.axis, 0, 0, tiled=True)
    count = sent.sum(1)
    rounds = lax.pmax(-(-count.max() // how.room), jax.sharding.get_abstract_mesh().axis_names)
    return Plan(order, expert, count, jnp.cumsum(count) - count, came, rounds)


def _round(
    how: Exchange, i: Array, p: Any, x: Float[Array, "BT D"], weight: Float[Array, " M"], plan: Plan
) -> Float[Array, "M D"]:
    """Weighted results of the choices of round i, sorted by expert; zeros for the others."""
    place = i * how.room + jnp.arange(how.room)  # in each device's queue
    source = jnp.minimum(plan.start[:, None] + place[None], len(plan.order) - 1)
    there = place[None] < plan.count[:, None]
    sent_XCD = jnp.where(there[..., None], x[plan.order[source] // how.cfg.router.top_k], 0)
    came_XCD = lax.all_to_all(sent_XCD, how.axis, 0, 0, tiled=True)
    # weights are applied over there, so that results need not come back once more for the gradient of the weights
    weight_XC = lax.all_to_all(jnp.where(there, weight[source], 0), how.axis, 0, 0, tiled=True)
    out_XCD = _here(how, place, p, came_XCD, plan.came) * weight_XC[..., None].astype(x.dtype)
    back_XCD = lax.all_to_all(out_XCD, how.axis, 0, 0, tiled=True)
    device = plan.expert // (how.cfg.experts // how.size)
    queued = jnp.arange(len(plan.order)) - plan.start[device]
    mine = queued // how.room == i
    return jnp.where(mine[:, None], back_XCD[device, queued % how.room], 0)


def _here(
    how: Exchange, place: Int[Array, " C"], p: Any, x_XCD: Float[Array, "X C D"], came_Xe: Int[Array, "X e"]
) -> Float[Array, "X C D"]:
    """What has come, through the experts of this device."""
    X, C, D = x_XCD.shape
    local = came_Xe.shape[1]
    expert = (place[None, :, None] >= jnp.cumsum(came_Xe, 1)[:, None]).sum(-1).reshape(-1)  # `local`: nothing came
    order = jnp.argsort(expert, stable=True)
    size_e = jnp.bincount(expert, length=local + 1)[:local].astype(jnp.int32)
    real: Bool[Array, "M 1"] = (jnp.arange(X * C) < size_e.sum())[:, None]
    y = _experts(p, how.cfg, jnp.where(real, x_XCD.reshape(X * C, D)[order], 0), expert[order], size_e)
    return jnp.where(real, y, 0)[jnp.argsort(order)].reshape(X, C, D)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(
    how: Exchange, p: Any, x: Float[Array, "BT D"], weight: Float[Array, " M"], plan: Plan
) -> Float[Array, "M D"]:
    """Weighted results of all choices, sorted by expert, in as many rounds as it takes.

    The weights are in here so that the backward pass needs nothing of the forward one's results.
    """
    return _forward(how, p, x, weight, plan)[0]


def _forward(how: Exchange, p: Any, x: Array, weight: Array, plan: Plan) -> tuple[Array, tuple[Any, ...]]:
    def more(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        i, y = carry
        return i + 1, y + _round(how, i, p, x, weight, plan)

    start = jnp.zeros((), jnp.int32), jnp.zeros((len(plan.order), x.shape[1]), x.dtype)
    return lax.while_loop(lambda carry: carry[0] < plan.rounds, more, start)[1], (p, x, weight, plan)


def _backward(how: Exchange, saved: tuple[Any, ...], g: Float[Array, "M D"]) -> tuple[Any, Array, Array, None]:
    p, x, weight, plan = saved

    def more(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        i, total = carry
        _, pull = jax.vjp(lambda p, x, weight: _round(how, i, p, x, weight, plan), p, x, weight)
        return i + 1, jax.tree.map(jnp.add, total, pull(g))

    start = jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, (p, x, weight))
    dp, dx, dweight = lax.while_loop(lambda carry: carry[0] < plan.rounds, more, start)[1]
    return dp, dx, dweight, None


_exchanged.defvjp(_forward, _backward)
