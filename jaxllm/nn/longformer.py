"""Longformer's attention. The global keys are written once more behind the row, where a static pattern lets everybody
see them, and hidden in their own places: so any attention kernel does it, and visits only blocks of the window."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import Columns, Full, Local, Longformer
from jaxllm.nn.attend import Given, NewRows, Scoring, attend
from jaxllm.nn.ffn import linear, linear_params
from jaxllm.params import ParamTree
from jaxllm.records import Mask
from jaxllm.remat import Name, named

_NAMES: dict[str, Name] = {"q": "query", "k": "key", "v": "value"}


def longformer_params(cfg: Longformer, dim: int, gain: float = 1.0) -> ParamTree:
    """q, k, v, q_global, k_global, v_global [D, N, H] and o [N, H, D], all with biases."""
    head = {"head_dim": cfg.head_dim}
    names = ("q", "k", "v", "q_global", "k_global", "v_global")
    tree: ParamTree = {name: linear_params({"embed": dim}, {"heads": cfg.heads} | head, True) for name in names}
    return tree | {"o": linear_params({"heads": cfg.heads} | head, {"embed": dim}, True, gain)}


def longformer(
    p: Any, cfg: Longformer, x_BTD: Float[Array, "B T D"], given: Given
) -> tuple[Float[Array, "B T D"], NewRows]:
    """One layer. The global tokens are those of `inputs.global_BG`; None: no token is."""
    if given.causal or given.inputs.slot_BT is not None:
        raise ValueError("Longformer: is for encoders and whole rows; set causal=False and leave inputs.slot_BT out")

    def heads(name: str, x: Array) -> Float[Array, "B T N H"]:
        return named(linear(p[name], x, "BTD,DNH->BTNH"), _NAMES[name[0]])

    scale, window = cfg.head_dim**-0.5, Local(cfg.reach + 1)
    q, k, v = (heads(name, x_BTD) for name in ("q", "k", "v"))
    (B, T), slots = x_BTD.shape[:2], given.inputs.global_BG
    rows = (k.swapaxes(1, 2), v.swapaxes(1, 2))
    segment = jnp.ones((B, T), jnp.int32) if given.inputs.segment_BT is None else given.inputs.segment_BT
    if slots is None:
        mask = Mask(q_segment_BT=given.inputs.segment_BT, k_segment_BS=given.inputs.segment_BT)
        o = attend(q, k, v, Scoring(window, scale), mask, given.runtime)
    else:
        G, at = slots.shape[1], jnp.minimum(slots, T - 1)
        special = (slots[:, :, None] == jnp.arange(T)[None, None]).any(1)
        chosen = jnp.where(slots < T, jnp.take_along_axis(segment, at, 1), 0)
        keys = jnp.concatenate([jnp.where(special, 0, segment), chosen], 1)
        mask = Mask(q_segment_BT=segment, k_segment_BS=keys)
        k, v = (jnp.concatenate([x, jnp.take_along_axis(x, at[:, :, None, None], 1)], 1) for x in (k, v))
        o = attend(q, k, v, Scoring((window & Columns(0, T)) | Columns(T, T + G), scale), mask, given.runtime)
        x_BGD = jnp.take_along_axis(x_BTD, at[:, :, None], 1)
        everything = Mask(q_segment_BT=chosen, k_segment_BS=segment)
        args = (heads("q_global", x_BGD), heads("k_global", x_BTD), heads("v_global", x_BTD))
        seen = attend(*args, Scoring(Full(), scale), everything, given.runtime)
        o = o.at[jnp.arange(B)[:, None], slots].set(seen, mode="drop")
    return named(linear(p["o"], o, "BTNH,NHD->BTD"), "attention_out"), rows
