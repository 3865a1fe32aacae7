"""Attention of a few new tokens per row to a cache and to one another: the plain path, which says what is meant.

Cached and new keys are scored apart under one softmax, so that a cache is read in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm import config
from jaxllm.cache import Cache, read
from jaxllm.kernels.modifiers import NONE, Modifiers, bias
from jaxllm.kernels.reference import Names, visible


class New(NamedTuple):
    """The new tokens, which are not in the cache yet. Segment 0 is padding."""

    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K h"]
    slot_BT: Int[Array, "B T"]
    segment_BT: Int[Array, "B T"]
    prefix_B: Int[Array, " B"] | None = None


def reference(
    q_BTNH: Float[Array, "B T N H"],
    new: New,
    cached: tuple[Cache, Any],
    pattern: config.Pattern,
    modifiers: Modifiers = NONE,
    *,
    scale: float,
    softcap: float | None = None,
    dtype: Any = None,
) -> Float[Array, "B T N h"]:
    """softmax(scale * q k^T) v over what each query sees of layer cached[1] of the cache cached[0], and of `new`.

    dtype: in which products are taken, None for that of q. Scores are float32; the result has the dtype of q.
    """
    (B, T, N, H), K, m = q_BTNH.shape, new.k.shape[2], modifiers
    dtype = q_BTNH.dtype if dtype is None else dtype
    (cache, index), as_cached = cached, [x.swapaxes(1, 2).astype(dtype) for x in (new.k, new.v)]
    old = Names(new.slot_BT, cache.slot_BS, new.segment_BT, cache.segment_BS, new.prefix_B)
    own = Names(new.slot_BT, new.slot_BT, new.segment_BT, new.segment_BT, new.prefix_B)
    parts = ((*read(cache, index, new.v.shape[-1], dtype), old), (*as_cached, own))
    q_BTKGH = (q_BTNH * scale).reshape(B, T, K, N // K, H).astype(dtype)
    scores = []
    for k, _, at in parts:
        s = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k, preferred_element_type=jnp.float32)
        s = s if softcap is None else softcap * jnp.tanh(s / softcap)
        added = bias(m, at.q_slot_BT, at.k_slot_BS, m.shift_BT)
        s = s if added is None else s + added.reshape(-1, *s.shape[1:])
        scores.append(jnp.where(visible(pattern, at)[:, None, None], s, -jnp.inf))
    tops = [s.max(-1, keepdims=True) for s in scores]
    if m.sinks_N is not None:
        sinks = m.sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        tops.append(jnp.broadcast_to(sinks, tops[0].shape))
    top = jnp.maximum(jnp.max(jnp.concatenate(tops, -1), -1, keepdims=True), -1e30)
    exps = [jnp.exp(s - top) for s in scores]
    total = sum(e.sum(-1) for e in exps) + (0.0 if m.sinks_N is None else jnp.exp(tops[-1] - top)[..., 0])
    out = sum(
        jnp.einsum("BKGTS,BKSH->BTKGH", e.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for e, (_, v, _) in zip(exps, parts, strict=True)
    )
    out = out / jnp.maximum(total, 1e-30).transpose(0, 3, 1, 2)[..., None]
    return out.astype(q_BTNH.dtype).reshape(B, T, N, -1)
