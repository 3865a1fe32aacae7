"""Contrastive learning of two towers.

Unusual: the other rows of the batch are what a row is told apart from, so micro-batches do not add up to the big batch
(fewer negatives); the temperature is learned with the rest.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxllm.config import TwoTower
from jaxllm.nn.patch import Patched
from jaxllm.records import inputs
from jaxllm.runtime import Runtime
from jaxllm.two_tower import compare


@struct.dataclass
class Pairs:
    """B images, each with its text. tokens_BT: int32, padded.  mask_BT: int32, 1 for real tokens."""

    tokens_BT: Int[Array, "B T"]
    mask_BT: Int[Array, "B T"]
    images: Patched


def info_nce(logits_BB: Float[Array, "B B"]) -> Float[Array, ""]:
    """The mean of the cross-entropies of rows and of columns, in nats, when the diagonal is right (CLIP, figure 3)."""
    right = jnp.diagonal(logits_BB)
    rows, columns = (jax.nn.logsumexp(logits_BB, axis) - right for axis in (1, 0))
    return (rows.mean() + columns.mean()) / 2


def contrastive_loss(
    params: Any, spec: TwoTower, batch: Pairs, runtime: Runtime, key: Array | None = None
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Symmetric InfoNCE over unit vectors, times the learned exp(log_scale).

    aux: weight [] (B), right [] (rows whose own text is the nearest).
    """
    found = compare(params, spec, inputs(batch.tokens_BT, batch.mask_BT), batch.images, runtime, key)
    logits, n = found.logits_per_image, len(batch.tokens_BT)
    right = jnp.argmax(logits, 1) == jnp.arange(n)
    return info_nce(logits), {"weight": jnp.float32(n), "right": right.sum().astype(jnp.float32)}
