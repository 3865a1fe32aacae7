"""What stands before the first layer: token, position and type vectors."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import Learned, Sinusoidal, Transformer
from jaxllm.nn.ffn import linear, linear_params
from jaxllm.nn.norm import norm, norm_params
from jaxllm.nn.position import sinusoid
from jaxllm.params import Normal, Param, ParamTree
from jaxllm.records import Inputs
from jaxllm.runtime import Runtime
from jaxllm.sharding import constrain, lookup


def embed_params(spec: Transformer) -> ParamTree:
    """tokens [V, D]; positions [P, D] if they are learned, types [n, D], norm, projection [d, D] if there are any."""
    cfg, width = spec.embed, spec.embed.dim or spec.dim

    def rows(n: int, axis: str, dim: int = spec.dim) -> Param:
        return Param((n, dim), (axis, "embed"), Normal(0.02))

    tree: ParamTree = {"tokens": rows(spec.vocab, "vocab", width)}
    if cfg.dim is not None:
        tree["projection"] = linear_params({"embed": cfg.dim}, {"out": spec.dim}, False)
    if isinstance(cfg.position, Learned):
        tree["positions"] = rows(cfg.position.length + cfg.position.offset, "positions")
    if cfg.types is not None:
        tree["types"] = rows(cfg.types, "types")
    if cfg.norm is not None:
        tree["norm"] = norm_params(cfg.norm, spec.dim)
    return tree


def embed(params: Any, spec: Transformer, inputs: Inputs, runtime: Runtime) -> Float[Array, "B T D"]:
    """Token vectors (or `inputs.embeds_BTD`, taken as they are), plus positions and types, normalised.

    Ids outside the vocabulary, and positions outside a learned table, give NaN.
    """
    cfg, dtype, p = spec.embed, jnp.dtype(runtime.compute_dtype), params["embed"]
    declared = embed_params(spec)

    def rows(name: str, ids: Array) -> Array:
        return lookup(declared[name], p[name], ids, runtime.layout, dtype)

    if inputs.embeds_BTD is not None:
        x = inputs.embeds_BTD.astype(dtype)
    elif inputs.tokens_BT is not None:
        x = token_vectors(params, spec, inputs.tokens_BT, runtime)
    else:
        raise ValueError("forward: inputs need tokens_BT or embeds_BTD, both are None")
    match cfg.position:
        case Learned(offset=offset):
            x = x + rows("positions", places(cfg.position, inputs) + offset)
        case Sinusoidal() as wave:
            table = jnp.asarray(sinusoid(wave, spec.dim), dtype)
            x = x + table.at[inputs.position_BT].get(mode="fill", fill_value=jnp.nan)
        case None:
            pass
    if cfg.types is not None:
        types = inputs.type_BT
        x = x + (rows("types", jnp.zeros(x.shape[:2], jnp.int32) if types is None else types))
    x = x if cfg.norm is None else norm(p["norm"], cfg.norm, x)
    return constrain(x, ("batch", "stream", None), runtime.layout)


def token_vectors(
    params: Any, spec: Transformer, tokens_BT: Int[Array, "B T"], runtime: Runtime
) -> Float[Array, "B T D"]:
    """Embeddings of ids times `scale`, at the model's width; nothing about places yet. NaN outside the vocabulary."""
    cfg, dtype, p = spec.embed, jnp.dtype(runtime.compute_dtype), params["embed"]
    x = lookup(embed_params(spec)["tokens"], p["tokens"], tokens_BT, runtime.layout, dtype)
    x = x if cfg.scale is None else x * jnp.asarray(cfg.scale, dtype)
    return x if cfg.dim is None else linear(p["projection"], x, "BTd,dD->BTD")


def places(cfg: Learned, inputs: Inputs) -> Int[Array, "B T"]:
    """What a learned table is read by."""
    if cfg.by == "position":
        return inputs.position_BT
    if inputs.slot_BT is not None:
        return inputs.slot_BT
    shape = inputs.position_BT.shape
    return jnp.broadcast_to(jnp.arange(shape[-1]), shape)
