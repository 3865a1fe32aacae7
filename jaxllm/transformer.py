"""The transformer: embedding, stacks of blocks, head. One block serves every architecture.

params = init(transformer_params(spec), key)
out = forward(params, spec, inputs(tokens), runtime)
logits(params, spec, out.hidden_BTD, runtime)
"""

from __future__ import annotations

from functools import partial
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.cache import KV, Caches, Rows
from jaxllm.config import Block, Stack, Transformer
from jaxllm.leaves import project
from jaxllm.nn.attention import attention, attention_params
from jaxllm.nn.ffn import ffn, ffn_params
from jaxllm.nn.norm import norm, norm_params
from jaxllm.nn.position import Rotations, rotations
from jaxllm.params import Constant, Normal, Param, ParamTree, layer, stacked
from jaxllm.records import Aux, Inputs, Output
from jaxllm.runtime import Runtime
from jaxllm.sharding import constrain, lookup, use

# ------------------------------------------------------------------------------------------------------ parameters


def block_params(cfg: Block, dim: int, gain: float) -> ParamTree:
    """One layer's parameters. `gain` scales the projections that write to the residual stream."""
    tree = {
        "attn": attention_params(cfg.attn, dim, gain),
        "attn_norm": norm_params(cfg.norm, dim),
        "ffn": ffn_params(cfg.ffn, dim, gain),
        "ffn_norm": norm_params(cfg.norm, dim),
    }
    if cfg.place == "sandwich":
        tree |= {"attn_post_norm": norm_params(cfg.norm, dim), "ffn_post_norm": norm_params(cfg.norm, dim)}
    return tree


def embed_params(spec: Transformer) -> ParamTree:
    """tokens [V, D], and positions [P, D] if they are learned."""
    tree = {"tokens": Param((spec.vocab, spec.dim), ("vocab", "embed"), Normal(0.02))}
    if spec.embed_position is not None:
        rows = spec.embed_position.length + spec.embed_position.offset
        tree["positions"] = Param((rows, spec.dim), ("positions", "embed"), Normal(0.02))
    return tree


def transformer_params(spec: Transformer) -> ParamTree:
    """Every parameter of the model, stacked per place in each stack's pattern.

    embed/tokens [V, D], embed/positions [P, D], stacks/<stack>/<place>/..., norm, head/kernel [V, D], head/bias [V].
    Residual projections start at 1 / sqrt(2 layers) of the usual scale (GPT-2, §2.3).
    """
    gain = (2 * spec.layers) ** -0.5
    stacks = {
        str(s): {
            str(b): stacked(block_params(block, spec.dim, gain), stack.repeats) for b, block in enumerate(stack.pattern)
        }
        for s, stack in enumerate(spec.stacks)
    }
    tree: ParamTree = {"embed": embed_params(spec), "stacks": stacks}
    if spec.norm is not None:
        tree["norm"] = norm_params(spec.norm, spec.dim)
    head = {} if spec.tied else {"kernel": Param((spec.vocab, spec.dim), ("vocab", "embed"), Normal(spec.dim**-0.5))}
    if spec.head_bias:
        head["bias"] = Param((spec.vocab,), ("vocab",), Constant(0.0))
    return tree | ({"head": head} if head else {})


# --------------------------------------------------------------------------------------------------------- forward


def block(
    p: Any,
    cfg: Block,
    x_BTD: Float[Array, "B T D"],
    inputs: Inputs,
    turns: Rotations,
    runtime: Runtime,
    cached: tuple[KV, Int[Array, ""] | int] | None = None,
    causal: bool = True,
) -> tuple[Float[Array, "B T D"], tuple[tuple[Array, Array], dict[str, Array]]]:
    """One residual layer: attention, then feed-forward. Returns x, the new (k, v), and the taps asked for."""
    taps = {"residual": x_BTD}

    def attend(h: Array) -> tuple[Array, tuple[Array, Array]]:
        return attention(p["attn"], cfg.attn, h, inputs, turns, runtime, cached, causal)

    match cfg.place:
        case "pre":
            taps["attn"], kv = attend(norm(p["attn_norm"], cfg.norm, x_BTD))
            x = x_BTD + taps["attn"]
            taps["ffn"] = ffn(p["ffn"], cfg.ffn, norm(p["ffn_norm"], cfg.norm, x))
            x = x + taps["ffn"]
        case "post":
            taps["attn"], kv = attend(x_BTD)
            x = norm(p["attn_norm"], cfg.norm, x_BTD + taps["attn"])
            taps["ffn"] = ffn(p["ffn"], cfg.ffn, x)
            x = norm(p["ffn_norm"], cfg.norm, x + taps["ffn"])
        case "sandwich":
            h, kv = attend(norm(p["attn_norm"], cfg.norm, x_BTD))
            taps["attn"] = norm(p["attn_post_norm"], cfg.norm, h)
            x = x_BTD + taps["attn"]
            h = ffn(p["ffn"], cfg.ffn, norm(p["ffn_norm"], cfg.norm, x))
            taps["ffn"] = norm(p["ffn_post_norm"], cfg.norm, h)
            x = x + taps["ffn"]
        case other:
            assert_never(other)
    x = constrain(x, ("batch", None, None), runtime.layout)
    return x, (kv, {name: taps[name] for name in runtime.taps})


def _remat(f: Any, runtime: Runtime, scanned: bool) -> Any:
    save = jax.checkpoint_policies
    wrap = partial(jax.checkpoint, prevent_cse=not scanned)
    match runtime.remat:
        case "none":
            return f
        case "full":
            return wrap(f, policy=save.nothing_saveable)
        case "attention":
            return wrap(f, policy=save.save_only_these_names("attn_out"))
        case "dots":
            return wrap(f, policy=save.dots_with_no_batch_dims_saveable)
        case other:
            assert_never(other)


def run_stack(
    params: Any, cfg: Stack, x_BTD: Array, inputs: Inputs, turns: Rotations, runtime: Runtime, caches: Any, causal: bool
) -> tuple[Array, list[Any]]:
    """A scan over repeats, a Python loop over the pattern. Returns x and, per place, ((k, v), taps) stacked over L.

    params: per place a stacked tree, or a list of layers (`params.unstack`), which is run as a Python loop.
    """
    places = range(len(cfg.pattern))
    listed = isinstance(params["0"], list)
    loop = listed or runtime.unroll

    def one(b: int, p: Any, x: Array, index: Any) -> Any:
        declared = block_params(cfg.pattern[b], x.shape[-1], 1.0)
        ready = use(declared, p, runtime.layout, runtime.compute_dtype)
        cached = None if caches is None else (caches[b], index)
        x, (kv, taps) = block(ready, cfg.pattern[b], x, inputs, turns, runtime, cached, causal)
        return x, (None if caches is None else kv, taps)

    def repeat(x: Array, layers: Any) -> tuple[Array, list[Any]]:
        ps, index = layers
        out = []
        for b in places:
            x, got = _remat(partial(one, b), runtime, not loop)(ps[b], x, index)
            out.append(got)
        return x, out

    if not loop:
        return jax.lax.scan(repeat, x_BTD, ([params[str(b)] for b in places], jnp.arange(cfg.repeats)))
    outs = []
    for i in range(cfg.repeats):
        picked = [params[str(b)][i] if listed else layer(params[str(b)], i) for b in places]
        x_BTD, got = repeat(x_BTD, (picked, i))
        outs.append(got)
    return x_BTD, jax.tree.map(lambda *xs: jnp.stack(xs), *outs)


def embed(params: Any, spec: Transformer, inputs: Inputs, runtime: Runtime) -> Float[Array, "B T D"]:
    """Token embeddings (or `inputs.embeds_BTD`, taken as they are) times `embed_scale`, plus learned positions."""
    dtype = jnp.dtype(runtime.compute_dtype)
    declared = embed_params(spec)

    def rows(name: str, ids: Array) -> Array:
        return lookup(declared[name], params["embed"][name], ids, runtime.layout, dtype)

    if inputs.embeds_BTD is None:
        if inputs.tokens_BT is None:
            raise ValueError("forward: inputs need tokens_BT or embeds_BTD, both are None")
        x = rows("tokens", inputs.tokens_BT)
        x = x if spec.embed_scale is None else x * jnp.asarray(spec.embed_scale, dtype)
    else:
        x = inputs.embeds_BTD.astype(dtype)
    if spec.embed_position is not None:
        x = x + rows("positions", inputs.position_BT + spec.embed_position.offset)
    return constrain(x, ("batch", None, None), runtime.layout)


def forward(params: Any, spec: Transformer, inputs: Inputs, runtime: Runtime, caches: Caches | None = None) -> Output:
    """Hidden states of every token, in one pass.

    caches: only read; the new rows come back in `Output.rows` for `cache.commit`. None: no rows are kept.
    Ids outside the vocabulary, and learned positions outside their table, give NaN.
    """
    x = embed(params, spec, inputs, runtime)
    turns = rotations(spec, inputs.position_BT)
    rows, taps = [], []
    for s, stack in enumerate(spec.stacks):
        held = None if caches is None else caches[s]
        x, outs = run_stack(params["stacks"][str(s)], stack, x, inputs, turns, runtime, held, spec.causal)
        if caches is not None:
            segment_BT = jnp.ones(x.shape[:2], jnp.int32) if inputs.segment_BT is None else inputs.segment_BT
            rows.append(tuple(Rows(k, v, segment_BT) for (k, v), _ in outs))
        taps.append([t for _, t in outs])
    if spec.norm is not None:
        x = norm(params["norm"], spec.norm, x)
    return Output(x, None if caches is None else tuple(rows), Aux(_by_layer(taps, runtime)))


def _by_layer(taps: list[list[dict[str, Array]]], runtime: Runtime) -> dict[str, Array]:
    """[stack][place] -> name -> [L of that place, ...] becomes name -> [all layers in order, ...]."""

    def join(name: str) -> Array:
        stacks = [jnp.stack([t[name] for t in places], 1) for places in taps]  # [repeats, places, ...]
        return jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in stacks])

    return {name: join(name) for name in runtime.taps}


def head(params: Any, spec: Transformer) -> Any:
    """The output projection [V, D]: the embedding when tied."""
    return params["embed"]["tokens"] if spec.tied else params["head"]["kernel"]


def logits(
    params: Any, spec: Transformer, hidden_BTD: Float[Array, "B T D"], runtime: Runtime
) -> Float[Array, "B T V"]:
    """float32 [B, T, V]. For losses take `objectives.token_logprobs`, which never holds them all."""
    declared = Param((spec.vocab, spec.dim), ("vocab", "embed"), Constant(0.0))
    kernel = use({"w": declared}, {"w": head(params, spec)}, runtime.layout, runtime.compute_dtype)["w"]
    out = project(hidden_BTD, kernel, "BTD,VD->BTV").astype(jnp.float32)
    if spec.head_bias:
        out = out + params["head"]["bias"].astype(jnp.float32)[None, None]
    return out if spec.logit_softcap is None else spec.logit_softcap * jnp.tanh(out / spec.logit_softcap)
