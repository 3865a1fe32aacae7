"""What is done to scores beside scaling, capping and masking: ALiBi, relative biases, sinks.

All go by slots: within a segment the distance of two slots is that of their positions.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxllm.config import Alibi, RelativeBias


@struct.dataclass
class Modifiers:
    """slopes_N: of `alibi`.  table_RN: scores per bucket of `relative`.  sinks_N: logits without a value.

    shift_BT: position - slot of the queries, only for an Alibi that rounds (which does not see distances alone).
    """

    slopes_N: Float[Array, " N"] | None = None
    table_RN: Float[Array, "R N"] | None = None
    sinks_N: Float[Array, " N"] | None = None
    shift_BT: Int[Array, "B T"] | None = None
    alibi: Alibi | None = struct.field(pytree_node=False, default=None)
    relative: RelativeBias | None = struct.field(pytree_node=False, default=None)

    @property
    def plain(self) -> bool:
        """Whether there is nothing to do."""
        return self.slopes_N is None and self.table_RN is None and self.sinks_N is None


NONE = Modifiers()


def bucket(cfg: RelativeBias, distance: Int[Array, ...]) -> Int[Array, ...]:
    """Bucket of key slot - query slot, in 0 .. buckets - 1 (Raffel et al. 2020, §2.1)."""
    half = cfg.buckets if cfg.causal else cfg.buckets // 2
    n = jnp.maximum(-distance, 0) if cfg.causal else jnp.abs(distance)
    exact = half // 2
    log = jnp.log(jnp.maximum(n, 1).astype(jnp.float32) / exact) / math.log(cfg.furthest / exact) * (half - exact)
    near = jnp.where(n < exact, n, jnp.minimum(exact + log.astype(jnp.int32), half - 1))
    return near if cfg.causal else near + jnp.where(distance > 0, half, 0)


def bias(m: Modifiers, q_slot_BT: Any, k_slot_BS: Any, shift_BT: Any) -> Float[Array, "_ N T S"] | None:
    """What is added to the scores of these slots ([B or 1, T] and [B or 1, S]); None when nothing is. float32."""
    if m.table_RN is not None and m.relative is not None:
        at = bucket(m.relative, k_slot_BS[:, None, :] - q_slot_BT[:, :, None])
        return jnp.moveaxis(m.table_RN.astype(jnp.float32)[at], -1, 1)
    if m.slopes_N is None or m.alibi is None:
        return None
    slopes = m.slopes_N[None, :, None, None]
    if not m.alibi.rounded:
        distance = (k_slot_BS[:, None, :] - q_slot_BT[:, :, None])[:, None].astype(jnp.float32)
        return slopes * m.alibi.scale * distance
    position = (k_slot_BS[:, None, :] + (0 if shift_BT is None else shift_BT[:, :, None]))[:, None]
    return m.alibi.scale * _bfloat16(_bfloat16(slopes) * _bfloat16(position.astype(jnp.float32)))


def _bfloat16(x: Array) -> Array:
    """x rounded to bfloat16, in float32; never optimised away."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
