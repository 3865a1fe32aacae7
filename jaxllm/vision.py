"""Vision towers and adapters: from patches of pixels to vectors that a text model can read.

features = vision(params, cfg, cut(cfg, pixel_values), runtime)      # the tower's [B, P, width]
vectors = adapt(params, cfg, vision_cfg, text_dim, features, runtime)  # [B, p, text_dim]
"""

from __future__ import annotations

from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import Adapter, Merger, Projector, QFormer, Resampler, Vision
from jaxllm.nn.attention import Given, cross_attention, cross_params
from jaxllm.nn.ffn import ACTIVATIONS, linear, linear_params
from jaxllm.nn.norm import norm, norm_params
from jaxllm.nn.patch import Patched, patch_embed, patch_params, resized, sinusoid_2d
from jaxllm.nn.position import Tables, tables
from jaxllm.params import Normal, Param, ParamTree
from jaxllm.records import Inputs, Memory
from jaxllm.runtime import Runtime
from jaxllm.sharding import use
from jaxllm.transformer import run_stack, stack_params

# ------------------------------------------------------------------------------------------------------------ towers


def vision_params(cfg: Vision) -> ParamTree:
    """patch/..., stacks/<stack>/<place>/..., embed_norm and norm if there are any."""
    return _tower_edges(cfg) | {"stacks": stack_params(cfg.stacks, cfg.dim)}


def _tower_edges(cfg: Vision) -> ParamTree:
    tree: ParamTree = {"patch": patch_params(cfg)}
    norms = {"embed_norm": cfg.embed_norm, "norm": cfg.norm}
    return tree | {name: norm_params(one, cfg.dim) for name, one in norms.items() if one is not None}


def vision_layers(
    params: Any, cfg: Vision, images: Patched, runtime: Runtime, key: Array | None = None
) -> list[Float[Array, "B P D"]]:
    """Hidden states before the first stack, and after each one that the features need; never normalised at the end."""
    edges = use(_tower_edges(cfg), {k: v for k, v in params.items() if k != "stacks"}, runtime.layout, _dtype(runtime))
    x = patch_embed(edges["patch"], cfg, images)
    x = x if cfg.embed_norm is None else norm(edges["embed_norm"], cfg.embed_norm, x)
    place = images.place_2BP
    inputs = Inputs(None, place, x, segment_BT=images.segment_BP, window_BT=images.window_BP)
    found = tables(params, cfg.stacks, place)
    out = [x]
    needed = len(cfg.stacks) if cfg.features is None else max(cfg.features)
    for s, stack in enumerate(cfg.stacks[:needed]):
        own = None if key is None else jax.random.fold_in(key, s)
        given = Given(inputs, found, runtime, causal=False, key=own)
        out.append(run_stack(params["stacks"][str(s)], stack, out[-1], given)[0])
    return out


def vision(
    params: Any, cfg: Vision, images: Patched, runtime: Runtime, key: Array | None = None
) -> Float[Array, "B P W"]:
    """The features of every patch, [B, P, W], in the order of the tower (`Patched.order_U` says which that is)."""
    layers = vision_layers(params, cfg, images, runtime, key)
    if cfg.features is None:
        x = layers[-1] if cfg.norm is None else norm(params["norm"], cfg.norm, layers[-1])
    else:
        x = jnp.concatenate([layers[n] for n in cfg.features], -1)
    return x[:, 1:] if cfg.class_token and not cfg.keep_class else x


def _dtype(runtime: Runtime) -> Any:
    return runtime.compute_dtype


# ---------------------------------------------------------------------------------------------------------- adapters


def adapter_params(cfg: Adapter, tower: Vision, dim: int) -> ParamTree:
    """From features of `tower` to vectors of width `dim`.

    Projector: up [W, D], down [D, D].  Merger: norm [W], up [m*m*W, m*m*W], down [m*m*W, D].
    QFormer: queries [n, Q], norm [Q], stacks/..., out [Q, D].
    Resampler: queries [n, D], inputs [W, D], query_norm, key_norm, norm [D], attn/..., out [D, D].
    """
    match cfg:
        case Projector(bias=bias):
            up = linear_params({"features": tower.width}, {"embed": dim}, bias)
            return {"up": up, "down": linear_params({"embed": dim}, {"out": dim}, bias)}
        case Merger(own):
            block = tower.merge**2 * tower.width
            up, down = (linear_params({"features": block}, {"out": width}, True) for width in (block, dim))
            return {"norm": norm_params(own, tower.width), "up": up, "down": down}
        case QFormer():
            out = linear_params({"features": cfg.dim}, {"embed": dim}, True)
            return _qformer_edges(cfg) | {"stacks": stack_params(cfg.stacks, cfg.dim), "out": out}
        case Resampler(cross=cross):
            norms = {name: norm_params(cfg.norm, cross.dim) for name in ("query_norm", "key_norm", "norm")}
            return norms | {
                "queries": Param((cfg.side**2, cross.dim), ("positions", "embed"), Normal(0.02)),
                "inputs": linear_params({"features": tower.width}, {"embed": cross.dim}, False),
                "attn": cross_params(cross, cross.dim),
                "out": linear_params({"embed": cross.dim}, {"out": dim}, False),
            }
        case other:
            assert_never(other)


def _qformer_edges(cfg: QFormer) -> ParamTree:
    queries = Param((cfg.queries, cfg.dim), ("positions", "embed"), Normal(0.02))
    return {"queries": queries, "norm": norm_params(cfg.norm, cfg.dim)}


def adapt(
    params: Any, cfg: Adapter, tower: Vision, dim: int, x_BPW: Float[Array, "B P W"], runtime: Runtime
) -> Float[Array, "B p D"]:
    """Features as vectors of width `dim`, as many as the adapter makes of P."""
    declared = adapter_params(cfg, tower, dim)
    edges = {name: tree for name, tree in declared.items() if name != "stacks"}
    p = use(edges, {name: params[name] for name in edges}, runtime.layout, _dtype(runtime))
    match cfg:
        case Projector(act):
            return linear(p["down"], ACTIVATIONS[act](linear(p["up"], x_BPW, "BPW,WD->BPD")), "BPD,DE->BPE")
        case Merger(own, act):
            x = norm(p["norm"], own, x_BPW).reshape(len(x_BPW), -1, tower.merge**2 * tower.width)
            return linear(p["down"], ACTIVATIONS[act](linear(p["up"], x, "BPW,WX->BPX")), "BPX,XD->BPD")
        case QFormer():
            return _qformer(p, params["stacks"], cfg, x_BPW, runtime)
        case Resampler():
            return _resampler(p, cfg, x_BPW, runtime)
        case other:
            assert_never(other)


def _qformer(
    p: Any, stacks: Any, cfg: QFormer, x_BPW: Float[Array, "B P W"], runtime: Runtime
) -> Float[Array, "B n D"]:
    q = norm(p["norm"], cfg.norm, _repeated(p["queries"], x_BPW))
    given = _reading(Memory(x_BPW), q, runtime)
    for s, stack in enumerate(cfg.stacks):
        q = run_stack(stacks[str(s)], stack, q, given)[0]
    return linear(p["out"], q, "BnQ,QD->BnD")


def _resampler(p: Any, cfg: Resampler, x_BPW: Float[Array, "B P W"], runtime: Runtime) -> Float[Array, "B n D"]:
    x = norm(p["key_norm"], cfg.norm, linear(p["inputs"], x_BPW, "BPW,WD->BPD"))
    places = jnp.asarray(sinusoid_2d(cfg.side, cfg.cross.dim), x.dtype)
    side = round(x.shape[1] ** 0.5)
    keys = x + (places if side == cfg.side else resized(places, cfg.side, side))[None]
    q = _repeated(norm(p["query_norm"], cfg.norm, p["queries"]) + places, x)
    q = cross_attention(p["attn"], cfg.cross, q, _reading(Memory(x, key_BSM=keys), q, runtime), None)
    return linear(p["out"], norm(p["norm"], cfg.norm, q), "BnD,DE->BnE")


def _repeated(x_nD: Float[Array, "n D"], like: Array) -> Float[Array, "B n D"]:
    return jnp.broadcast_to(x_nD.astype(like.dtype), (len(like), *x_nD.shape))


def _reading(memory: Memory, x: Float[Array, "B n D"], runtime: Runtime) -> Given:
    """What layers share that read a memory and have no positions of their own."""
    position = jnp.zeros(x.shape[:2], jnp.int32)
    return Given(Inputs(None, position, x, memory=memory), Tables(), runtime, causal=False)
