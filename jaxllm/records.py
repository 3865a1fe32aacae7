"""Records that cross room borders: what a forward takes and gives, a batch, a train state.

Three facts about a token that must never be conflated:

    slot      its order in the row. Masks and caches go by it.
    position  what rotary and learned embeddings see. Left padding and packing make it differ from the slot.
    segment   which document of the row it belongs to; 0 is padding. Tokens meet only within a segment.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

Params = Any  # nested dicts of leaves (`jaxllm.leaves.Weight`)


@struct.dataclass
class Mask:
    """The run-time half of an attention mask: arrays that narrow a static `Pattern`. None means "no restriction".

    q_slot_BT, k_slot_BS: int32 [B, T], [B, S]. None: slots are 0..T-1 and 0..S-1, which kernels exploit.
    q_segment_BT, k_segment_BS: int32. Pairs with different segments never meet; a key of segment 0 is never seen.
    prefix_B: int32 [B]. Keys with slot < prefix are seen from everywhere in the row (prefix LM), whatever the pattern.
    """

    q_slot_BT: Int[Array, "B T"] | None = None
    k_slot_BS: Int[Array, "B S"] | None = None
    q_segment_BT: Int[Array, "B T"] | None = None
    k_segment_BS: Int[Array, "B S"] | None = None
    prefix_B: Int[Array, " B"] | None = None


@struct.dataclass
class Memory:
    """What cross-attention reads: an encoder's output, or image features.

    hidden_BSM: [B, S, M].  segment_BS: int32, 0 = padding; None: none.  packed: whether queries meet only keys of
    their own segment (several documents per row); otherwise every query of a row sees the whole memory.
    rows: keys and values of every layer, made once (`transformer.memory_rows`); None: made where they are used.
    key_BSM: what keys are made of when it is not `hidden_BSM` (positions added to keys alone).
    """

    hidden_BSM: Float[Array, "B S M"]
    segment_BS: Int[Array, "B S"] | None = None
    rows: Any = None
    key_BSM: Float[Array, "B S M"] | None = None
    packed: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Inputs:
    """What `forward` reads. Build one with `inputs(...)`.

    tokens_BT: int32 [B, T] ids; or embeds_BTD, already embedded (multimodal splices, gradient probes).
    slot_BT: int32 [B, T], or None for 0..T-1 (a full forward), which is what lets kernels skip blocks statically.
    position_BT: int32 [B, T]; [axes, B, T] for rotations with `sections` (M-RoPE).
    segment_BT: int32 [B, T], 0 = padding; None: one document per row without padding.
    prefix_B: int32 [B] for prefix LMs, else None.
    window_BT: int32 [B, T], takes the segment's place in layers that are `windowed`.
    type_BT: int32 [B, T], which of two sentences a token is of (BERT); None: the first.
    memory: for models with cross-attention.
    global_BG: int32 [B, G], slots of the tokens that see and are seen everywhere (`config.Longformer`); T or more where
        a row has fewer of them.
    """

    tokens_BT: Int[Array, "B T"] | None
    position_BT: Int[Array, "*axes B T"]
    embeds_BTD: Float[Array, "B T D"] | None = None
    slot_BT: Int[Array, "B T"] | None = None
    segment_BT: Int[Array, "B T"] | None = None
    prefix_B: Int[Array, " B"] | None = None
    type_BT: Int[Array, "B T"] | None = None
    window_BT: Int[Array, "B T"] | None = None
    memory: Memory | None = None
    global_BG: Int[Array, "B G"] | None = None


def inputs(
    tokens_BT: Int[Array, "B T"], attention_mask_BT: Int[Array, "B T"] | None = None, prefix_B: Array | None = None
) -> Inputs:
    """Inputs of a plain batch [B, T], padded on either side; positions count the real tokens from 0.

    attention_mask_BT: 1 for real tokens, 0 for padding (the HF convention); None when nothing is padded.
    """
    if attention_mask_BT is None:
        return Inputs(tokens_BT, jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape), prefix_B=prefix_B)
    mask = (attention_mask_BT > 0).astype(jnp.int32)
    return Inputs(tokens_BT, jnp.maximum(jnp.cumsum(mask, 1) - 1, 0), segment_BT=mask, prefix_B=prefix_B)


@struct.dataclass
class Aux:
    """By-products of a forward, stacked over layers.

    taps: name -> [L, ...], those that `runtime.taps` names.  experts: of the layers with a mixture of experts, "load"
    [L, E] (share of a token's choices per expert), "balance" and "z" [L] (losses, not weighted); empty without.
    """

    taps: dict[str, Array] = struct.field(default_factory=dict)
    experts: dict[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Output:
    """hidden_BTD: [B, T, D] after the final norm, in the compute dtype. rows: new cache rows, None without caches."""

    hidden_BTD: Float[Array, "B T D"]
    rows: Any
    aux: Aux


@struct.dataclass
class Batch:
    """A training batch. Arrays are [B, T] int32 but for the weights; numpy on the host, jax on devices.

    tokens_BT: inputs.  target_BT: the id to predict at each place.  weight_BT: float32, 0 where no loss is taken.
    segment_BT: 0 = padding.  position_BT: restarts at 0 in each segment.  channel_BT: index into the source's channels.
    """

    tokens_BT: Int[Array, "B T"]
    target_BT: Int[Array, "B T"]
    weight_BT: Float[Array, "B T"]
    segment_BT: Int[Array, "B T"]
    position_BT: Int[Array, "B T"]
    channel_BT: Int[Array, "B T"]


@struct.dataclass
class TrainState:
    """Everything a checkpoint holds.

    step: int32 [] optimiser steps taken.  params: masters, as they are stored.  opt_state: the optimiser's.
    extra: state that gradients do not train (skip counters, loss scale, EMA ...), advanced by a pure update.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    extra: dict[str, Any]
