"""Sparse mixtures of experts: a router chooses, three ways compute, all of them the same function.

    dense     every expert sees every token, weighted by zero where it was not chosen: the reference
    grouped   tokens are sorted by expert, and each projection is one product over the groups; dropless (`dispatch.py`)
    buffers   [B, E, C, D]: each expert takes up to C tokens of a row; what a `capacity` asks for

Routers are float32 whatever the compute dtype, weights and arithmetic. Padding (segment 0) is routed like the rest, but
neither counts in the statistics nor takes a place in a buffer.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.config import FFN, GLU, MLP, MoE, Router, Transformer
from jaxllm.leaves import dense, project
from jaxllm.nn.dispatch import grouped
from jaxllm.nn.ffn import activate, dense_ffn, dense_params, linear, linear_params
from jaxllm.params import Constant, Normal, Param, ParamTree, map_params
from jaxllm.remat import Name, named
from jaxllm.runtime import Runtime

Statistics = dict[str, Array]
"""load: [E] share of a token's choices that each expert got, summing to top_k.  prob: [E] mean of the router's scores.
balance, z: float32 [] losses."""


def ffn_params(cfg: FFN, dim: int, gain: float = 1.0) -> ParamTree:
    """A dense layer's parameters; or router/kernel [D, E], experts/... with a leading [E], shared/..., shared_gate."""
    match cfg:
        case MLP() | GLU():
            return dense_params(cfg, dim, gain)
        case MoE():
            return _moe_params(cfg, dim, gain)
        case other:
            assert_never(other)


def _moe_params(cfg: MoE, dim: int, gain: float) -> ParamTree:
    E, r = cfg.experts, cfg.router
    router: ParamTree = {"kernel": Param((dim, E), ("embed", "router"), Normal(dim**-0.5), exact=True)}
    if r.bias:
        router["bias"] = Param((E,), ("router",), Constant(0.0), exact=True)
    if r.correction:
        router["correction"] = Param((E,), ("router",), Constant(0.0), exact=True)
    tree: ParamTree = {"router": router, "experts": _expert_params(cfg, dim, gain)}
    if cfg.shared is not None:
        tree["shared"] = dense_params(cfg.shared, dim, gain)
    if cfg.shared_gate:
        tree["shared_gate"] = linear_params({"embed": dim}, {"gate": 1}, False)
    return tree


def _expert_params(cfg: MoE, dim: int, gain: float = 1.0) -> ParamTree:
    one = dense_params(cfg.expert, dim, gain)
    return map_params(lambda p: replace(p, shape=(cfg.experts, *p.shape), axes=("experts", *p.axes)), one)


def ffn(
    p: Any, cfg: FFN, x_BTD: Float[Array, "B T D"], real_BT: Bool[Array, "B T"] | None, runtime: Runtime
) -> tuple[Float[Array, "B T D"], Statistics]:
    """Any feed-forward layer, and a mixture's statistics. real_BT: False at padding; None: no padding."""
    match cfg:
        case MLP() | GLU():
            return dense_ffn(p, cfg, x_BTD, runtime.layout), {}
        case MoE():
            return moe(p, cfg, x_BTD, real_BT, runtime)
        case other:
            assert_never(other)


# ---------------------------------------------------------------------------------------------------------- routing


class Routing(NamedTuple):
    """Of each token's k choices the expert and the weight, and what the losses need. Floats are float32."""

    expert_BTk: Int[Array, "B T k"]
    weight_BTk: Float[Array, "B T k"]
    logits_BTE: Float[Array, "B T E"]
    prob_BTE: Float[Array, "B T E"]


def route(p: Any, cfg: Router, x_BTD: Float[Array, "B T D"]) -> Routing:
    """Scores of all experts, the choice, and the weights of the chosen (DeepSeek-AI 2024b, eq. 12-16)."""
    kernel = dense(p["kernel"], jnp.float32)
    logits = named(project(x_BTD.astype(jnp.float32), kernel, "BTD,DE->BTE", p.get("bias")), "router")
    match cfg.score:
        case "softmax":
            score = jax.nn.softmax(logits, -1)
        case "sigmoid":
            score = jax.nn.sigmoid(logits)
        case other:
            assert_never(other)
    choice = jax.lax.stop_gradient(score)
    if cfg.correction:
        choice = choice + p["correction"].astype(jnp.float32)[None, None]
    if cfg.groups > 1:
        choice = _best_groups(cfg, choice)
    expert = jax.lax.top_k(choice, cfg.top_k)[1]
    weight = jnp.take_along_axis(score, expert, -1)
    if cfg.renormalise:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return Routing(expert, weight * cfg.scale, logits, score / (score.sum(-1, keepdims=True) + 1e-20))


def _best_groups(cfg: Router, choice: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """-inf at the experts outside each token's best groups."""
    grouped = choice.reshape(*choice.shape[:2], cfg.groups, -1)
    match cfg.group_score:
        case "best":
            worth = grouped.max(-1)
        case "top2":
            worth = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
        case other:
            assert_never(other)
    best = jax.lax.top_k(worth, cfg.top_groups)[1]
    kept = (best[..., None] == jnp.arange(cfg.groups)[None, None, None]).any(2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)


def statistics(cfg: MoE, r: Routing, real_BT: Bool[Array, "B T"] | None) -> Statistics:
    """Loads, the balance loss E sum_e f_e P_e (Fedus et al. 2021, eq. 4), the z loss (Zoph et al. 2022, eq. 5)."""
    real = jnp.ones(r.logits_BTE.shape[:2]) if real_BT is None else real_BT.astype(jnp.float32)
    total = jnp.maximum(real.sum(), 1.0)
    chosen = (r.expert_BTk[..., None] == jnp.arange(cfg.experts)[None, None, None]).any(2)
    load_E = (chosen * real[..., None]).sum((0, 1)) / total
    prob_E = (r.prob_BTE * real[..., None]).sum((0, 1)) / total
    z = (jnp.square(jax.nn.logsumexp(r.logits_BTE, -1)) * real).sum() / total
    return {"load": load_E, "prob": prob_E, "balance": cfg.experts * (load_E * prob_E).sum(), "z": z}


def averaged(of_parts: Statistics, share_M: Float[Array, " M"], over: tuple[str, ...]) -> Statistics:
    """Statistics of a batch from those of its parts, each [G, M, ...], with its share of the real tokens.

    over: mesh axes that parts lie on beside, inside of a `shard_map`.
    """
    mean = {name: jax.lax.psum(jnp.einsum("GM...,M->G...", x, share_M), over) for name, x in of_parts.items()}
    return mean | {"balance": mean["load"].shape[-1] * (mean["load"] * mean["prob"]).sum(-1)} if mean else mean


# -------------------------------------------------------------------------------------------------------- computing


def moe(
    p: Any, cfg: MoE, x_BTD: Float[Array, "B T D"], real_BT: Bool[Array, "B T"] | None, runtime: Runtime
) -> tuple[Float[Array, "B T D"], Statistics]:
    """sum over chosen experts of weight * expert(x), plus the shared experts."""
    r = route(p["router"], cfg.router, x_BTD)
    if cfg.capacity is not None:
        y = _buffers(p["experts"], cfg, x_BTD, r, real_BT)
    elif runtime.experts == "dense":
        y = _dense(p["experts"], cfg, x_BTD, r)
    else:
        tree = _expert_params(cfg, x_BTD.shape[-1])
        y = grouped(p["experts"], cfg, tree, x_BTD, (r.expert_BTk, r.weight_BTk), runtime)
    if cfg.shared is not None:
        shared = dense_ffn(p["shared"], cfg.shared, x_BTD, runtime.layout)
        if cfg.shared_gate:
            shared = shared * jax.nn.sigmoid(linear(p["shared_gate"], x_BTD, "BTD,DI->BTI"))
        y = y + shared
    return y.astype(x_BTD.dtype), statistics(cfg, r, real_BT)


def _dense(p: Any, cfg: MoE, x_BTD: Float[Array, "B T D"], r: Routing) -> Float[Array, "B T D"]:
    """All experts for all tokens; E / top_k times the arithmetic."""
    chosen = r.expert_BTk[..., None] == jnp.arange(cfg.experts)[None, None, None]
    weight_BTE = jnp.where(chosen, r.weight_BTk[..., None], 0.0).sum(2)

    def per_expert(name: Name, x: Array, equation: str) -> Array:
        y = project(x, p[name]["kernel"], equation)
        return named(y + p[name]["bias"].astype(y.dtype)[None, None] if "bias" in p[name] else y, name)

    up = per_expert("up", x_BTD, "BTD,EDF->BTEF")
    gate = per_expert("gate", x_BTD, "BTD,EDF->BTEF") if isinstance(cfg.expert, GLU) else None
    out_BTED = per_expert("down", activate(cfg.expert, up, gate), "BTEF,EFD->BTED")
    return jnp.einsum("BTED,BTE->BTD", out_BTED, weight_BTE.astype(out_BTED.dtype))


def capacity(cfg: MoE, tokens: int) -> int:
    """Places per expert in a row of `tokens`: ceil(capacity * tokens * top_k / experts), at most `tokens`."""
    assert cfg.capacity is not None, "capacity: a dropless mixture has none"
    return min(tokens, math.ceil(cfg.capacity * tokens * cfg.router.top_k / cfg.experts))


def _buffers(
    p: Any, cfg: MoE, x_BTD: Float[Array, "B T D"], r: Routing, real_BT: Bool[Array, "B T"] | None
) -> Float[Array, "B T D"]:
    """Each expert's first C choices of a row, in order of tokens; the others are dropped (weight 0)."""
    B, T, D = x_BTD.shape
    C, k, E = capacity(cfg, T), cfg.router.top_k, cfg.experts
    chosen = r.expert_BTk.reshape(B, T * k)[..., None] == jnp.arange(E)[None, None]
    if real_BT is not None:
        chosen = chosen & jnp.repeat(real_BT, k, axis=1)[..., None]
    place = jnp.where(chosen, jnp.cumsum(chosen, 1) - 1, C).min(-1)  # place in the expert's queue; padding: C
    kept = place < C
    expert, place = r.expert_BTk.reshape(B, T * k), jnp.where(kept, place, C)  # C is out of range: dropped
    row = jnp.arange(B)[:, None]
    x_choices = jnp.repeat(x_BTD, k, axis=1)
    x_BECD = jnp.zeros((B, E, C, D), x_BTD.dtype).at[row, expert, place].set(x_choices, mode="drop")

    def per_expert(name: Name, x: Array, equation: str) -> Array:
        y = project(x, p[name]["kernel"], equation)
        return named(y + p[name]["bias"].astype(y.dtype)[None, :, None] if "bias" in p[name] else y, name)

    up = per_expert("up", x_BECD, "BECD,EDF->BECF")
    gate = per_expert("gate", x_BECD, "BECD,EDF->BECF") if isinstance(cfg.expert, GLU) else None
    out_BECD = per_expert("down", activate(cfg.expert, up, gate), "BECF,EFD->BECD")
    weight = jnp.where(kept, r.weight_BTk.reshape(B, T * k), 0.0)[..., None]
    back = out_BECD.at[row, expert, place].get(mode="fill", fill_value=0)
    return (back * weight.astype(back.dtype)).reshape(B, T, k, D).sum(2)


# ---------------------------------------------------------------------------------------------------------- balancing


def correct_routers(params: Any, spec: Transformer, load_LE: Float[Array, "L E"], rate: float) -> Any:
    """`rate` added to the correction of every expert below its router's mean load, and taken from those above.

    Balance without a loss (DeepSeek-AI 2024b, §2.1.2).  params: stacked, of a whole model.  load_LE: `aux.experts`'s.
    """
    stacks, start = dict(params["stacks"]), 0
    for s, stack in enumerate(spec.stacks):
        places = [b for b, block in enumerate(stack.pattern) if isinstance(block.ffn, MoE)]
        load = load_LE[start : start + len(places) * stack.repeats]
        start += len(load)
        for i, b in enumerate(places):
            if "correction" in stacks[str(s)][str(b)]["ffn"]["router"]:
                stacks[str(s)] = _corrected(stacks[str(s)], str(b), load[i :: len(places)], rate)
    return params | {"stacks": stacks}


def _corrected(stack: Any, place: str, load_LE: Float[Array, "L E"], rate: float) -> Any:
    block = stack[place]
    router = block["ffn"]["router"]
    moved = router["correction"] + rate * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)
    return stack | {place: block | {"ffn": block["ffn"] | {"router": router | {"correction": moved}}}}
