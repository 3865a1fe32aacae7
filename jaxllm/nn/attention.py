"""Attention layers: projections, rotary, and one call of the attention op.

With a cache, the keys are the cache's rows and the call's own new ones. A few query tokens (decoding) score the two
parts separately under one softmax, so that the cache is read in place; a long chunk (prefill over a cache) joins them
and takes the memory-O(n) path.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.cache import KV
from jaxllm.config import GQA, Attention, Causal, Pattern
from jaxllm.kernels.attention import DECODE_QUERIES
from jaxllm.kernels.attention import attention as attention_op
from jaxllm.kernels.reference import names, visible
from jaxllm.nn.ffn import linear, linear_params
from jaxllm.nn.norm import norm, norm_params
from jaxllm.nn.position import Rotations, rotate
from jaxllm.params import ParamTree
from jaxllm.records import Inputs, Mask
from jaxllm.runtime import Runtime
from jaxllm.sharding import mesh_sizes, partition


def attention_params(cfg: Attention, dim: int, gain: float = 1.0) -> ParamTree:
    """q [D, N, H], k and v [D, K, H], o [N, H, D] (started at `gain`), and q_norm, k_norm [H] if normalised."""
    head = {"head_dim": cfg.head_dim}
    kv = linear_params({"embed": dim}, {"kv_heads": cfg.kv_heads} | head, cfg.qkv_bias)
    tree = {
        "q": linear_params({"embed": dim}, {"heads": cfg.heads} | head, cfg.qkv_bias),
        "k": kv,
        "v": kv,
        "o": linear_params({"heads": cfg.heads} | head, {"embed": dim}, cfg.out_bias, gain),
    }
    if cfg.qk_norm is not None:
        tree |= {name: norm_params(cfg.qk_norm, cfg.head_dim, "head_dim") for name in ("q_norm", "k_norm")}
    return tree


def attention(
    p: Any,
    cfg: Attention,
    x_BTD: Float[Array, "B T D"],
    inputs: Inputs,
    rotations: Rotations,
    runtime: Runtime,
    cached: tuple[KV, Int[Array, ""] | int] | None = None,
    causal: bool = True,
) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    """One attention layer. Returns its output [B, T, D] and the new keys and values, each [B, K, T, H].

    cached: the stacked cache and this layer's index in it; with one, `inputs.slot_BT` says where the tokens stand.
    """
    q = linear(p["q"], x_BTD, "BTD,DNH->BTNH")
    k = linear(p["k"], x_BTD, "BTD,DKH->BTKH")
    v = linear(p["v"], x_BTD, "BTD,DKH->BTKH")
    if cfg.qk_norm is not None:
        q, k = norm(p["q_norm"], cfg.qk_norm, q), norm(p["k_norm"], cfg.qk_norm, k)
    if cfg.position is not None:
        table = rotations[cfg.position, cfg.head_dim]
        q, k = rotate(cfg.position, table, q), rotate(cfg.position, table, k)
    pattern = Causal() & cfg.pattern if causal else cfg.pattern
    if cached is None or cached[0].slot_BS.shape[1] == 0:
        mask = Mask(inputs.slot_BT, inputs.slot_BT, inputs.segment_BT, inputs.segment_BT, inputs.prefix_B)
        o = attend(cfg, q, k, v, pattern, mask, runtime)
    else:
        o = _attend_cached(cfg, q, k, v, pattern, inputs, runtime, *cached)
    o = checkpoint_name(o, "attn_out")
    return linear(p["o"], o, "BTNH,NHD->BTD"), (k.swapaxes(1, 2), v.swapaxes(1, 2))


def scale_of(cfg: GQA) -> float:
    """What scores are multiplied by: `cfg.scale`, or head_dim**-0.5."""
    return cfg.head_dim**-0.5 if cfg.scale is None else cfg.scale


def attend(
    cfg: GQA, q: Array, k: Array, v: Array, pattern: Pattern, mask: Mask, runtime: Runtime
) -> Float[Array, "B T N H"]:
    """The attention op on the context mesh: batch and heads are split by the layout, each device runs the kernel.

    q [B, T, N, H]; k, v [B, S, K, H].
    """
    backend = resolve_backend(runtime)
    op = partial(attention_op, pattern=pattern, scale=scale_of(cfg), softcap=cfg.softcap, backend=backend)

    def run(q: Array, k: Array, v: Array, mask: Mask) -> Array:
        return op(q, k, v, mask=mask)

    sizes = mesh_sizes()
    if backend in ("reference", "chunked") or runtime.layout is None or not sizes:
        return run(q, k, v, mask)

    def spec(axes: tuple[str | None, ...], x: Array) -> PartitionSpec:
        return partition(axes, x.shape, runtime.layout, sizes)  # type: ignore[arg-type]

    q_spec = spec(("batch", None, "heads", None), q)
    kv_spec = spec(("batch", None, "kv_heads", None), k)
    mask_spec = jax.tree.map(lambda x: spec(("batch", *[None] * (x.ndim - 1)), x), mask)
    return jax.shard_map(run, in_specs=(q_spec, kv_spec, kv_spec, mask_spec), out_specs=q_spec, check_vma=False)(
        q, k, v, mask
    )


def resolve_backend(runtime: Runtime) -> Any:
    """ "auto" by the platform that jax computes on."""
    if runtime.attention != "auto":
        return runtime.attention
    return {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}.get(jax.default_backend(), "chunked")


def _attend_cached(
    cfg: GQA,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    pattern: Pattern,
    inputs: Inputs,
    runtime: Runtime,
    cache: KV,
    index: Int[Array, ""] | int,
) -> Float[Array, "B T N H"]:
    if inputs.slot_BT is None:
        raise ValueError("attention: a forward over a filled cache needs inputs.slot_BT, the slots of the new tokens")
    if cache.ring and inputs.prefix_B is not None:
        raise ValueError(
            "attention: a prefix is seen from everywhere, a ring cache forgets it; init it with ring=False"
        )
    segment_BT = jnp.ones_like(inputs.slot_BT) if inputs.segment_BT is None else inputs.segment_BT
    # XLA on CPU lacks batched dots of two bf16 arrays with a float32 result (UNIMPLEMENTED at run time).
    few, plain = q_BTNH.shape[1] <= DECODE_QUERIES, resolve_backend(runtime) in ("reference", "chunked")
    dtype = jnp.float32 if few and plain else q_BTNH.dtype
    old_k, old_v = cache.k[index].astype(dtype), cache.v[index].astype(dtype)
    old = Mask(inputs.slot_BT, cache.slot_BS, segment_BT, cache.segment_BS, inputs.prefix_B)
    new = Mask(inputs.slot_BT, inputs.slot_BT, segment_BT, segment_BT, inputs.prefix_B)
    if few:
        new_k, new_v = (x.swapaxes(1, 2).astype(dtype) for x in (k_BTKH, v_BTKH))
        return _decode(cfg, q_BTNH, ((old_k, old_v, old), (new_k, new_v, new)), pattern)
    joined = replace(
        old,
        k_slot_BS=jnp.concatenate([cache.slot_BS, inputs.slot_BT], 1),
        k_segment_BS=jnp.concatenate([cache.segment_BS, segment_BT], 1),
    )
    k = jnp.concatenate([old_k.swapaxes(1, 2), k_BTKH], 1)
    v = jnp.concatenate([old_v.swapaxes(1, 2), v_BTKH], 1)
    return attend(cfg, q_BTNH, k, v, pattern, joined, Runtime(attention="chunked", layout=runtime.layout))


def _decode(
    cfg: GQA, q_BTNH: Array, parts: tuple[tuple[Array, Array, Mask], ...], pattern: Pattern
) -> Float[Array, "B T N H"]:
    """softmax over the keys of all parts at once; scores are small since T is."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = (q_BTNH * scale_of(cfg)).reshape(B, T, cfg.kv_heads, N // cfg.kv_heads, H)
    q_BTKGH = q_BTKGH.astype(parts[0][0].dtype)
    scores = []
    for k, _, mask in parts:
        s = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k, preferred_element_type=jnp.float32)
        s = s if cfg.softcap is None else cfg.softcap * jnp.tanh(s / cfg.softcap)
        scores.append(jnp.where(visible(pattern, names(mask, T, k.shape[2]))[:, None, None], s, -jnp.inf))
    top = jnp.maximum(
        jnp.max(jnp.concatenate([s.max(-1, keepdims=True) for s in scores], -1), -1, keepdims=True), -1e30
    )
    exps = [jnp.exp(s - top) for s in scores]
    total = sum(e.sum(-1) for e in exps)
    out = sum(
        jnp.einsum("BKGTS,BKSH->BTKGH", e.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for e, (_, v, _) in zip(exps, parts, strict=True)
    )
    out = out / jnp.maximum(total, 1e-30).transpose(0, 3, 1, 2)[..., None]
    return out.astype(q_BTNH.dtype).reshape(B, T, N, H)
