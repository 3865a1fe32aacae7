"""Attention layers: projections, positions, and one call of the attention op (`jaxllm.nn.attend`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, assert_never

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import GQA, MLA, Alibi, Attention, Causal, Cross, Longformer, Pattern, RelativeBias, Rope
from jaxllm.kernels.modifiers import Modifiers
from jaxllm.leaves import dense
from jaxllm.nn.attend import Cached, Given, NewRows, Scoring, attend, self_attend
from jaxllm.nn.ffn import linear, linear_params
from jaxllm.nn.longformer import longformer, longformer_params
from jaxllm.nn.norm import norm, norm_params, qk_norm, qk_norm_params
from jaxllm.nn.position import alibi_slopes, rotate
from jaxllm.params import Normal, Param, ParamTree
from jaxllm.records import Inputs, Mask, Memory
from jaxllm.remat import named


def attention_params(cfg: Attention, dim: int, gain: float = 1.0) -> ParamTree:
    """Projections of one layer, those that write to the residual stream started at `gain`.

    GQA: q [D, N, H], k and v [D, K, H], o [N, H, D]; q_norm, k_norm if normalised; sinks [N].
    MLA: q [D, N, H], or q_down [D, R], q_norm and q_up [R, N, H]; kv_down [D, R], kv_norm [R], k_rope [D, rope],
    k_up [R, N, nope], v_up [R, N, value], o [N, value, D].
    Longformer: q, k, v, q_global, k_global, v_global [D, N, H], o [N, H, D], all with biases.
    """
    match cfg:
        case GQA():
            return _gqa_params(cfg, dim, dim, gain)
        case MLA():
            return _mla_params(cfg, dim, gain)
        case Longformer():
            return longformer_params(cfg, dim, gain)
        case other:
            assert_never(other)


def _gqa_params(cfg: GQA, dim: int, memory_dim: int, gain: float) -> ParamTree:
    head = {"head_dim": cfg.head_dim}
    kv = linear_params({"embed": memory_dim}, {"kv_heads": cfg.kv_heads} | head, cfg.qkv_bias)
    tree: ParamTree = {
        "q": linear_params({"embed": dim}, {"heads": cfg.heads} | head, cfg.qkv_bias),
        "k": kv,
        "v": kv,
        "o": linear_params({"heads": cfg.heads} | head, {"embed": dim}, cfg.out_bias, gain),
    }
    if cfg.qk_norm is not None:
        tree["q_norm"] = qk_norm_params(cfg.qk_norm, cfg.heads, cfg.head_dim, "heads")
        tree["k_norm"] = qk_norm_params(cfg.qk_norm, cfg.kv_heads, cfg.head_dim, "kv_heads")
    if cfg.sinks:
        tree["sinks"] = Param((cfg.heads,), ("heads",), Normal(0.02))
    return tree


def _mla_params(cfg: MLA, dim: int, gain: float) -> ParamTree:
    D, R = {"embed": dim}, {"rank": cfg.kv_rank}
    query = {"heads": cfg.heads, "head_dim": cfg.nope_dim + cfg.rope_dim}
    if cfg.q_rank is None:
        tree = {"q": linear_params(D, query, False)}
    else:
        tree = {
            "q_down": linear_params(D, {"rank": cfg.q_rank}, cfg.bias),
            "q_norm": norm_params(cfg.norm, cfg.q_rank, "rank"),
            "q_up": linear_params({"rank": cfg.q_rank}, query, False),
        }
    return tree | {
        "kv_down": linear_params(D, R, cfg.bias),
        "kv_norm": norm_params(cfg.norm, cfg.kv_rank, "rank"),
        "k_rope": linear_params(D, {"head_dim": cfg.rope_dim}, cfg.bias),
        "k_up": linear_params(R, {"heads": cfg.heads, "head_dim": cfg.nope_dim}, False),
        "v_up": linear_params(R, {"heads": cfg.heads, "head_dim": cfg.value_dim}, False),
        "o": linear_params({"heads": cfg.heads, "head_dim": cfg.value_dim}, D, cfg.bias, gain),
    }


def attention(
    p: Any, cfg: Attention, x_BTD: Float[Array, "B T D"], given: Given, cached: Cached | None = None
) -> tuple[Float[Array, "B T D"], NewRows]:
    """One self-attention layer. Returns its output [B, T, D] and the new cache rows.

    cached: with one that is not empty, `inputs.slot_BT` says where the tokens stand.
    """
    cached = None if cached is None or cached[0].slot_BS.shape[1] == 0 else cached
    match cfg:
        case GQA():
            return _gqa(p, cfg, x_BTD, given, cached)
        case MLA():
            return _mla(p, cfg, x_BTD, given, cached)
        case Longformer():
            return longformer(p, cfg, x_BTD, given)
        case other:
            assert_never(other)


def _pattern(cfg: GQA | MLA, given: Given) -> Pattern:
    return Causal() & cfg.pattern if given.causal else cfg.pattern


def _gqa(
    p: Any, cfg: GQA, x_BTD: Float[Array, "B T D"], given: Given, cached: Cached | None
) -> tuple[Float[Array, "B T D"], NewRows]:
    q = named(linear(p["q"], x_BTD, "BTD,DNH->BTNH"), "query")
    q = q if cfg.qk_norm is None else qk_norm(p["q_norm"], cfg.qk_norm, q)
    q = _rotated(cfg, _clip(cfg, q), given)
    k, v = keys_values(p, cfg, x_BTD, given) if given.shared is None else given.shared
    scoring = Scoring(_pattern(cfg, given), scale_of(cfg), cfg.softcap, _modifiers(p, cfg, given))
    if cfg.windowed:
        given = given._replace(inputs=replace(given.inputs, segment_BT=given.inputs.window_BT))
    o = self_attend(q, k, v, scoring, given, cached)
    return named(linear(p["o"], o, "BTNH,NHD->BTD"), "attention_out"), (k.swapaxes(1, 2), v.swapaxes(1, 2))


def keys_values(
    p: Any, cfg: GQA, x_BTD: Float[Array, "B T D"], given: Given
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Keys, normalised and rotated, and values of one layer, or of a stack whose layers share them."""
    k = named(linear(p["k"], x_BTD, "BTD,DKH->BTKH"), "key")
    v = named(linear(p["v"], x_BTD, "BTD,DKH->BTKH"), "value")
    k = k if cfg.qk_norm is None else qk_norm(p["k_norm"], cfg.qk_norm, k)
    return _rotated(cfg, _clip(cfg, k), given), _clip(cfg, v)


def _rotated(cfg: GQA, x_BTNH: Float[Array, "B T N H"], given: Given) -> Float[Array, "B T N H"]:
    if not isinstance(cfg.position, Rope):
        return x_BTNH
    return rotate(cfg.position, given.tables.rotations[cfg.position, cfg.head_dim], x_BTNH)


def _clip(cfg: GQA, x: Array) -> Float[Array, ...]:
    return x if cfg.clip is None else jnp.clip(x, -cfg.clip, cfg.clip)


def _modifiers(p: Any, cfg: GQA, given: Given) -> Modifiers:
    m = Modifiers(sinks_N=p["sinks"] if cfg.sinks else None)
    match cfg.position:
        case Alibi() as alibi:
            shift = None
            if alibi.rounded:
                position = given.inputs.position_BT
                slot = given.inputs.slot_BT
                shift = position - (jnp.arange(position.shape[-1])[None] if slot is None else slot)
            return replace(m, slopes_N=jnp.asarray(alibi_slopes(alibi, cfg.heads)), alibi=alibi, shift_BT=shift)
        case RelativeBias() as relative:
            return replace(m, table_RN=given.tables.bias_RN, relative=relative)
        case _:
            return m


def scale_of(cfg: GQA | MLA) -> float:
    """What scores are multiplied by: `cfg.scale`, or (width of a key)**-0.5."""
    match cfg:
        case GQA(scale=None):
            return cfg.head_dim**-0.5
        case MLA(scale=None):
            return (cfg.nope_dim + cfg.rope_dim) ** -0.5
        case _:
            return float(cfg.scale)  # type: ignore[arg-type]


def _mla(
    p: Any, cfg: MLA, x_BTD: Float[Array, "B T D"], given: Given, cached: Cached | None
) -> tuple[Float[Array, "B T D"], NewRows]:
    """Naive without a cache: keys and values of all heads are made from the latents. Absorbed with one (§2.1.2 of the
    paper): queries are taken into the latent, where all heads share one key and value, and results back out of it.
    """
    if cfg.q_rank is None:
        q = linear(p["q"], x_BTD, "BTD,DNH->BTNH")
    else:
        low = norm(p["q_norm"], cfg.norm, named(linear(p["q_down"], x_BTD, "BTD,DR->BTR"), "latent"))
        q = linear(p["q_up"], low, "BTR,RNH->BTNH")
    q = named(q, "query")
    table = given.tables.rotations[cfg.position, cfg.rope_dim]
    q_nope, q_rope = q[..., : cfg.nope_dim], rotate(cfg.position, table, q[..., cfg.nope_dim :])
    latent = norm(p["kv_norm"], cfg.norm, named(linear(p["kv_down"], x_BTD, "BTD,DR->BTR"), "latent"))
    k_rope = named(linear(p["k_rope"], x_BTD, "BTD,DH->BTH"), "latent")
    k_rope = rotate(cfg.position, table, k_rope[:, :, None])
    one_key = jnp.concatenate([latent[:, :, None], k_rope], -1)  # all that is cached
    scoring = Scoring(_pattern(cfg, given), scale_of(cfg))
    if cached is None:
        k_nope = named(linear(p["k_up"], latent, "BTR,RNH->BTNH"), "key")
        k = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope, (*k_nope.shape[:3], cfg.rope_dim))], -1)
        v = named(linear(p["v_up"], latent, "BTR,RNH->BTNH"), "value")
        o = self_attend(jnp.concatenate([q_nope, q_rope], -1), k, v, scoring, given, None)
    else:
        k_up, v_up = (dense(p[name]["kernel"], x_BTD.dtype) for name in ("k_up", "v_up"))
        q = jnp.concatenate([jnp.einsum("BTNH,RNH->BTNR", q_nope, k_up), q_rope], -1)
        o = self_attend(q, one_key, latent[:, :, None], scoring, given, cached)
        o = jnp.einsum("BTNR,RNH->BTNH", o, v_up)
    rows = one_key.swapaxes(1, 2)
    return named(linear(p["o"], o, "BTNH,NHD->BTD"), "attention_out"), (rows, rows[..., :0])


# ---------------------------------------------------------------------------------------------------------- memories


def cross_params(cfg: Cross, dim: int, gain: float = 1.0) -> ParamTree:
    """q [D, N, H], k and v [M, K, H], o [N, H, D]."""
    return _gqa_params(cfg.attn, dim, cfg.dim, gain)


def memory_rows(p: Any, cfg: Cross, memory: Memory) -> NewRows:
    """Keys and values of a memory for one layer, [B, K, S, H]: filled once, read at every step."""
    source = memory.hidden_BSM if memory.key_BSM is None else memory.key_BSM
    k = named(linear(p["k"], source, "BSM,MKH->BSKH"), "key")
    v = named(linear(p["v"], memory.hidden_BSM, "BSM,MKH->BSKH"), "value")
    if cfg.attn.qk_norm is not None:
        k = qk_norm(p["k_norm"], cfg.attn.qk_norm, k)
    return k.swapaxes(1, 2), v.swapaxes(1, 2)


def cross_attention(
    p: Any, cfg: Cross, x_BTD: Float[Array, "B T D"], given: Given, rows: NewRows | None
) -> Float[Array, "B T D"]:
    """Attention to `inputs.memory`; to its precomputed `rows` of this layer if they are there."""
    memory = given.inputs.memory
    if memory is None:
        raise ValueError("cross-attention: inputs.memory is None; give the encoder's output as a Memory")
    attn = cfg.attn
    k, v = memory_rows(p, cfg, memory) if rows is None else rows
    q = named(linear(p["q"], x_BTD, "BTD,DNH->BTNH"), "query")
    q = q if attn.qk_norm is None else qk_norm(p["q_norm"], attn.qk_norm, q)
    mask = _memory_mask(given.inputs, memory)
    scoring = Scoring(attn.pattern, scale_of(attn), attn.softcap)
    o = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), scoring, mask, given.runtime)
    return named(linear(p["o"], o, "BTNH,NHD->BTD"), "attention_out")


def _memory_mask(inputs: Inputs, memory: Memory) -> Mask:
    """Segments must agree if the memory is packed; otherwise only its padding is hidden."""
    return Mask(
        q_segment_BT=inputs.segment_BT if memory.packed else None,
        k_segment_BS=memory.segment_BS,
    )
