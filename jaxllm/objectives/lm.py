"""Next-token prediction."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import Transformer
from jaxllm.experiment import Balance
from jaxllm.objectives.logprobs import token_logprobs
from jaxllm.records import Aux, Batch, Inputs
from jaxllm.runtime import Runtime
from jaxllm.transformer import forward


def inputs_of(batch: Batch) -> Inputs:
    """What `forward` needs of a batch; slots are 0..T-1."""
    return Inputs(batch.tokens_BT, batch.position_BT, segment_BT=batch.segment_BT)


def nll(params: Any, spec: Transformer, batch: Batch, runtime: Runtime) -> Float[Array, "B T"]:
    """-log p(target) of every token in nats, float32; 0 where the weight is 0."""
    return _nll(params, spec, batch, runtime, None)[0]


def _nll(
    params: Any, spec: Transformer, batch: Batch, runtime: Runtime, key: Array | None
) -> tuple[Float[Array, "B T"], Aux]:
    out = forward(params, spec, inputs_of(batch), runtime, key=key)
    logprob_BT = token_logprobs(params, spec, out.hidden_BTD, batch.target_BT, runtime)
    return jnp.where(batch.weight_BT > 0, -logprob_BT, 0.0), out.aux


def lm_loss(
    params: Any,
    spec: Transformer,
    batch: Batch,
    runtime: Runtime,
    key: Array | None = None,
    *,
    channels: int = 1,
    balance: Balance | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean next-token cross-entropy in nats over tokens of positive weight, plus the losses of routers in `balance`.

    key: of dropout; None: none.
    aux: weight [], and by channel of the token [channels]: channel_nll, channel_weight (sums). With mixtures also
    router_loss [] and expert_load [L, E], times weight. Router losses are of a micro-batch, whatever its weight.
    """
    nll_BT, found = _nll(params, spec, batch, runtime, key)
    weighted_BT = nll_BT * batch.weight_BT
    of_channel = batch.channel_BT[..., None] == jnp.arange(channels)[None, None]
    weight = batch.weight_BT.sum()
    aux = {
        "weight": weight,
        "channel_nll": jnp.where(of_channel, weighted_BT[..., None], 0.0).sum((0, 1)),
        "channel_weight": jnp.where(of_channel, batch.weight_BT[..., None], 0.0).sum((0, 1)),
    }
    loss = weighted_BT.sum() / jnp.maximum(weight, 1e-9)
    if balance is None or not found.experts:
        return loss, aux
    extra = balance.load * found.experts["balance"].mean() + balance.z * found.experts["z"].mean()
    return loss + extra, aux | {"router_loss": extra * weight, "expert_load": found.experts["load"] * weight}
