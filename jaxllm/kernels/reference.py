"""The mask as a predicate, and attention as the textbook writes it: [T, S] scores, softmax, weighted sum.

Every other path must agree with this file. Masked scores are a large finite negative number, never -inf: the
difference of two of them is 0 and not NaN, and a query that sees no key gives zeros with zero gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm import config
from jaxllm.kernels.modifiers import NONE, Modifiers, bias
from jaxllm.kernels.pattern import allowed
from jaxllm.records import Mask
from jaxllm.remat import named

MASKED = -1e30  # the score of a pair that may not meet
NOWHERE = 2**30  # the slot of a key that pads a block: no query sees it


class Names(NamedTuple):
    """A `Mask` without implied slots: those of queries [B or 1, T] and keys [B or 1, S] are arrays. int32."""

    q_slot_BT: Int[Array, "_ T"]
    k_slot_BS: Int[Array, "_ S"]
    q_segment_BT: Int[Array, "B T"] | None
    k_segment_BS: Int[Array, "B S"] | None
    prefix_B: Int[Array, " B"] | None


def names(mask: Mask, T: int, S: int) -> Names:
    """`mask` with slots spelled out."""
    q_slot = jnp.arange(T, dtype=jnp.int32)[None] if mask.q_slot_BT is None else mask.q_slot_BT
    k_slot = jnp.arange(S, dtype=jnp.int32)[None] if mask.k_slot_BS is None else mask.k_slot_BS
    return Names(q_slot, k_slot, mask.q_segment_BT, mask.k_segment_BS, mask.prefix_B)


def visible(pattern: config.Pattern, at: Names) -> Bool[Array, "_ T S"]:
    """Which pairs may meet: (pattern, or key in the prefix), and the same segment, and no padding."""
    q, k = at.q_slot_BT[:, :, None], at.k_slot_BS[:, None, :]
    ok = allowed(pattern, q, k) & (k < NOWHERE)
    if at.prefix_B is not None:
        ok = ok | (k < at.prefix_B[:, None, None])
    if at.k_segment_BS is not None:
        ok = ok & (at.k_segment_BS[:, None, :] != 0)
        if at.q_segment_BT is not None:
            ok = ok & (at.q_segment_BT[:, :, None] == at.k_segment_BS[:, None, :])
    return ok


def precision(dtype: jnp.dtype) -> lax.Precision:
    """Matmul precision that keeps what `dtype` holds: float32 inputs are not rounded to bfloat16 on the way."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def reference(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    pattern: config.Pattern,
    mask: Mask,
    modifiers: Modifiers = NONE,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Attention with [T, S] scores in float32; result in the dtype of q, as wide as the values."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    exact = precision(q_BTNH.dtype)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, precision=exact, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    at = names(mask, T, S)
    added = bias(modifiers, at.q_slot_BT, at.k_slot_BS, modifiers.shift_BT)
    if added is not None:
        scores_BKGTS += added.reshape(-1, K, N // K, T, S)
    ok = visible(pattern, at)[:, None, None]
    scores_BKGTS = jnp.where(ok, scores_BKGTS, MASKED)
    top = scores_BKGTS.max(-1, keepdims=True)
    sinks = None if modifiers.sinks_N is None else modifiers.sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
    top = lax.stop_gradient(top if sinks is None else jnp.maximum(top, sinks))
    weights_BKGTS = jnp.where(ok, jnp.exp(scores_BKGTS - top), 0.0)
    total = weights_BKGTS.sum(-1, keepdims=True) + (0.0 if sinks is None else jnp.exp(sinks - top))
    weights_BKGTS /= jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    o_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        weights_BKGTS.astype(v_BSKH.dtype),
        v_BSKH,
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    return named(jax.lax.convert_element_type(o_BTKGH.reshape(B, T, N, -1), q_BTNH.dtype), "attention")
