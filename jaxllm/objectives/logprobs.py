"""Log-probabilities of given tokens, chunked over the vocabulary: float32 [B, T, V] never exists.

A scan over groups of columns computes each group's logits, reduces them to a log-sum-exp and the target's logit, and
forgets them; the backward pass computes them once more. Per group the head is gathered and its gradient scattered
once, so sharding costs no more traffic than an ordinary layer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import Transformer
from jaxllm.leaves import chunk_rows, pad_rows
from jaxllm.nn.head import features, finish, head_kernel, lm_head
from jaxllm.params import Constant, Param
from jaxllm.runtime import Runtime
from jaxllm.sharding import constrain, use, ways


def token_logprobs(
    params: Any,
    spec: Transformer,
    hidden_BTD: Float[Array, "B T D"],
    target_BT: Int[Array, "B T"],
    runtime: Runtime,
) -> Float[Array, "B T"]:
    """log p(target | hidden), float32 [B, T]. Targets outside the vocabulary give NaN."""
    shards = ways("vocab", spec.vocab, runtime.layout)
    chunks, rows = _split(spec.vocab, runtime.vocab_chunk, shards)
    cfg, kernel = lm_head(spec), head_kernel(params, spec)
    hidden_BTD = features(params, spec, hidden_BTD)
    weight = chunk_rows(pad_rows(kernel, rows) if rows > spec.vocab else kernel, chunks, shards)
    column = chunk_rows(jnp.arange(rows), chunks, shards)
    bias = chunk_rows(jnp.pad(params["head"]["bias"], (0, rows - spec.vocab)), chunks, shards) if cfg.bias else None
    declared = Param((rows // chunks, hidden_BTD.shape[-1]), ("vocab", "embed"), Constant(0.0))
    hidden_BTD = constrain(hidden_BTD, ("batch", "length", None), runtime.layout)  # once, not in every chunk
    hidden32_BTD = hidden_BTD.astype(jnp.float32)  # its gradient is a sum over chunks: kept in float32

    @jax.checkpoint
    def one(carry: tuple[Array, Array], chunk: Any) -> tuple[tuple[Array, Array], None]:
        weight, column, bias = chunk
        column = column[None, None]
        ready = use({"w": declared}, {"w": weight}, runtime.layout, runtime.compute_dtype)["w"]
        logits = finish(cfg, hidden32_BTD.astype(runtime.compute_dtype), ready, bias)
        logits = constrain(logits, ("batch", "length", "vocab"), runtime.layout)
        logits = jnp.where(column < spec.vocab, logits, -jnp.inf) if rows > spec.vocab else logits
        total, target = carry
        total = jnp.logaddexp(total, jax.nn.logsumexp(logits, -1))
        target = target + jnp.sum(jnp.where(column == target_BT[..., None], logits, 0.0), -1)
        return (total, target), None

    start = jnp.full(target_BT.shape, -jnp.inf), jnp.zeros(target_BT.shape)
    (total, target), _ = jax.lax.scan(one, start, (weight, column, bias))
    valid = (target_BT >= 0) & (target_BT < spec.vocab)
    return jnp.where(valid, target - total, jnp.nan)


def _split(vocab: int, chunk: int, shards: int) -> tuple[int, int]:
    """(number of chunks, rows after padding): at most `chunk` columns each, padded only if no near number divides."""
    least = -(-vocab // chunk)
    for n in range(least, 2 * least + 1):
        if vocab % (n * shards) == 0:
            return n, vocab
    unit = least * shards
    return least, -(-vocab // unit) * unit
