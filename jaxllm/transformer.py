"""The transformer: embedding, stacks of blocks, head. One block serves every architecture.

params = init(transformer_params(spec), key)
out = forward(params, spec, inputs(tokens), runtime)
logits(params, spec, out.hidden_BTD, runtime)
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.cache import Caches, Rows
from jaxllm.config import GQA, Block, Stack, Transformer
from jaxllm.leaves import lower
from jaxllm.nn.attention import Cached, Given, attention, attention_params, cross_attention, cross_params, keys_values
from jaxllm.nn.attention import memory_rows as layer_memory
from jaxllm.nn.context import in_ring_order, in_row_order
from jaxllm.nn.embedding import embed, embed_params
from jaxllm.nn.head import classifier_params, classify, head_kernel, head_params, logits
from jaxllm.nn.moe import ffn, ffn_params
from jaxllm.nn.norm import norm, norm_params
from jaxllm.nn.pipeline import staged_layers, through_stages
from jaxllm.nn.position import relative_bias_params, tables
from jaxllm.params import Normal, Param, ParamTree, layer, map_with_paths, stacked
from jaxllm.records import Aux, Inputs, Memory, Output
from jaxllm.remat import checkpointed, named
from jaxllm.runtime import Runtime
from jaxllm.sharding import constrain, inside, use

__all__ = [
    "block",
    "block_params",
    "classify",
    "embed",
    "embed_params",
    "forward",
    "head_kernel",
    "logits",
    "memory_rows",
    "run_stack",
    "transformer_params",
]

# ------------------------------------------------------------------------------------------------------ parameters


def block_params(cfg: Block, dim: int, gain: float) -> ParamTree:
    """One layer's parameters. `gain` scales the projections that write to the residual stream, unless `cfg` has one."""
    gain = gain if cfg.gain is None else 1.0

    def one_norm() -> ParamTree:
        return norm_params(cfg.norm, dim)

    tree = {
        "attn": attention_params(cfg.attn, dim, gain),
        "attn_norm": one_norm(),
        "ffn": ffn_params(cfg.ffn, dim, gain),
    }
    if cfg.place != "shared":
        tree["ffn_norm"] = one_norm()
    if cfg.place == "sandwich":
        tree |= {"attn_post_norm": one_norm(), "ffn_post_norm": one_norm()}
    if cfg.cross is not None:
        tree |= {"cross": cross_params(cfg.cross, dim, gain), "cross_norm": one_norm()}
        if cfg.place == "sandwich":
            tree["cross_post_norm"] = one_norm()
    return tree if cfg.gain is None else map_with_paths(partial(_deepnorm, cfg.gain), tree)


def _deepnorm(gain: float, path: str, p: Param) -> Param:
    """Glorot's normal init, times `gain` for values, attention outputs and feed-forward (Wang et al. 2022, fig. 2)."""
    if not path.endswith("kernel"):
        return p
    inputs = [n for n, axis in zip(p.shape, p.axes, strict=True) if axis != "experts"][: -p.outputs]
    fan_in, fan_out = math.prod(inputs), math.prod(p.shape[-p.outputs :])
    scaled = path.startswith("ffn") or path.split("/")[1] in ("v", "o")
    return replace(p, init=Normal((gain if scaled else 1.0) * (2 / (fan_in + fan_out)) ** 0.5))


SHARED = ("k", "v", "k_norm")


def place_params(stack: Stack, place: int, dim: int, gain: float = 1.0) -> ParamTree:
    """One layer's parameters at a place of the stack's pattern, but for what its layers share."""
    tree = block_params(stack.pattern[place], dim, gain)
    if stack.shared is None:
        return tree
    return tree | {"attn": {name: p for name, p in tree["attn"].items() if name not in SHARED}}


def shared_params(stack: Stack, dim: int) -> ParamTree:
    """What makes the keys and values that all layers share: norm, k and v [D, K, H]; nothing where each has its own."""
    if stack.shared is None:
        return {}
    own = attention_params(stack.pattern[0].attn, dim)
    return {"norm": norm_params(stack.shared, dim)} | {name: own[name] for name in SHARED if name in own}


def stack_params(stacks: tuple[Stack, ...], dim: int) -> ParamTree:
    """<stack>/<place>/... of every stack, with a leading axis over its repeats.

    Residual projections start at 1 / sqrt(2 layers) of the usual scale (GPT-2, §2.3).
    """
    gain = (2 * sum(stack.layers for stack in stacks)) ** -0.5
    return {
        str(s): {str(b): stacked(place_params(stack, b, dim, gain), stack.repeats) for b in range(len(stack.pattern))}
        for s, stack in enumerate(stacks)
    }


def transformer_params(spec: Transformer) -> ParamTree:
    """Every parameter of the model, stacked per place in each stack's pattern.

    embed/tokens [V, D], embed/positions [P, D] ..., stacks/<stack>/<place>/..., norm, head/kernel [V, D], head/bias
    [V] ..., classifiers/<name>/..., relative_bias/table [buckets, N], shared/<stack>/... (`shared_params`).
    """
    tree: ParamTree = {"embed": embed_params(spec), "stacks": stack_params(spec.stacks, spec.dim)}
    tree |= relative_bias_params(spec.stacks)
    shared = {str(s): shared_params(stack, spec.dim) for s, stack in enumerate(spec.stacks) if stack.shared is not None}
    if shared:
        tree["shared"] = shared
    if spec.norm is not None:
        tree["norm"] = norm_params(spec.norm, spec.dim)
    head = head_params(spec)
    if head:
        tree["head"] = head
    if spec.classifiers:
        tree["classifiers"] = {name: classifier_params(cfg, spec.dim) for name, cfg in spec.classifiers}
    return tree


# --------------------------------------------------------------------------------------------------------- forward


def block(
    p: Any, cfg: Block, x_BTD: Float[Array, "B T D"], given: Given, cached: Cached | None = None, memory: Any = None
) -> tuple[Float[Array, "B T D"], Any]:
    """One residual layer. Returns x, and ((k, v), taps, statistics of experts).

    memory: this layer's keys and values of the memory, if they were made before.
    """

    def attend(h: Array) -> tuple[Array, Any]:
        return attention(p["attn"], cfg.attn, h, given, cached)

    def cross(h: Array) -> tuple[Array, Any]:
        assert cfg.cross is not None, "only called where there is one"
        return cross_attention(p["cross"], cfg.cross, h, given, memory), None

    def feed(h: Array) -> tuple[Array, Any]:
        return ffn(p["ffn"], cfg.ffn, h, _real(given.inputs), given.runtime)

    def drop(y: Array, place: int) -> Array:
        return dropout(y, cfg.dropout, None if given.key is None else jax.random.fold_in(given.key, place))

    x = named(x_BTD, "stream")
    taps = {"residual": x}
    extra: dict[str, Any] = {}
    if cfg.place in ("parallel", "shared"):
        h = inside(norm(p["attn_norm"], cfg.norm, x), "heads", given.runtime.layout)
        taps["attn"], extra["attn"] = attend(h)
        taps["ffn"], extra["ffn"] = feed(h if cfg.place == "shared" else norm(p["ffn_norm"], cfg.norm, x))
        both = constrain(taps["attn"] + taps["ffn"], ("batch", "stream", None), given.runtime.layout)
        x = x + drop(_scaled(both, cfg.branch_scale), 0)
    else:
        branches = {"attn": attend, "ffn": feed} if cfg.cross is None else {"attn": attend, "cross": cross, "ffn": feed}
        for place, (name, branch) in enumerate(branches.items()):
            x, taps[name], extra[name] = _residual(p, cfg, name, x, branch, partial(drop, place=place), given.runtime)
    return x, (extra["attn"], {name: taps[name] for name in given.runtime.taps}, extra["ffn"])


def _residual(
    p: Any, cfg: Block, name: str, x: Float[Array, "B T D"], branch: Any, drop: Any, runtime: Runtime
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Any]:
    """x with one branch added, what was added, and what else the branch gives."""

    def normed(which: str, h: Array) -> Array:
        return norm(p[f"{name}{which}"], cfg.norm, h)

    h = normed("_norm", x) if cfg.place in ("pre", "sandwich", "normed") else x
    y, extra = branch(inside(h, "ffn" if name == "ffn" else "heads", runtime.layout))
    y = constrain(y, ("batch", "stream", None), runtime.layout)  # sums over tensor end here
    match cfg.place:
        case "sandwich":
            y = normed("_post_norm", y)
        case "output":
            y = normed("_norm", y)
        case _:
            pass
    y = _scaled(drop(y), cfg.branch_scale)
    x = _scaled(h if cfg.place == "normed" else x, cfg.residual_scale) + y
    return normed("_norm", x) if cfg.place == "post" else x, y, extra


def _scaled(x: Float[Array, "B T D"], factor: float) -> Float[Array, "B T D"]:
    return x if factor == 1.0 else x * factor


def dropout(x: Float[Array, ...], rate: float, key: Array | None) -> Float[Array, ...]:
    """x with each element zeroed with probability `rate` and the others divided by 1 - rate; x itself without a key."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


def _real(inputs: Inputs) -> Bool[Array, "B T"] | None:
    return None if inputs.segment_BT is None else inputs.segment_BT > 0


def run_stack(
    params: Any, cfg: Stack, x_BTD: Float[Array, "B T D"], given: Given, caches: Any = None, memory: Any = None
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """All layers of a stack, those that the layout puts on stages as a pipeline. Arguments and results as of `_layers`.

    With caches, which a token would take through all stages in turn, and with taps there is no pipeline: weights are
    gathered from the stages.
    """
    plain = bool(given.runtime.taps) or caches is not None or memory is not None
    if plain or not staged_layers(cfg.repeats, given.runtime.layout):
        return _layers(params, cfg, x_BTD, given, caches, memory)
    tree = {str(b): place_params(cfg, b, x_BTD.shape[-1]) for b in range(len(cfg.pattern))}
    how = given.runtime
    remat = partial(checkpointed, remat=how.remat, offload=how.offload, prevent_cse=False)
    return through_stages(_layers, remat, tree, params, cfg, x_BTD, given)


def _layers(
    params: Any, cfg: Stack, x_BTD: Float[Array, "B T D"], given: Given, caches: Any = None, memory: Any = None
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """A scan over repeats, a Python loop over the pattern. Returns x and, per place, what `block` gives [L, ...].

    params: per place a stacked tree, or a list of layers (`params.unstack`), which is run as a Python loop.
    caches: per place, or the one of keys and values that are shared, whose new rows are not given here.
    memory: per place keys and values [L, ...] of the memory, or None.
    """
    places = range(len(cfg.pattern))
    listed = isinstance(params["0"], list)
    loop = listed or given.runtime.unroll

    def one(b: int, p: Any, x: Array, index: Any, held: Any) -> Any:
        declared = place_params(cfg, b, x.shape[-1])
        ready = use(declared, p, given.runtime.layout, given.runtime.compute_dtype)
        if given.runtime.matmul != "default":
            ready = lower(declared, ready, given.runtime.matmul)
        own = given.shared is None
        cached = None if caches is None else (caches[b], index) if own else (caches[0], 0)
        key = None if given.key is None else jax.random.fold_in(given.key, index * len(cfg.pattern) + b)
        x, (rows, taps, experts) = block(ready, cfg.pattern[b], x, given._replace(key=key), cached, held)
        return x, (rows if caches is not None and own else None, taps, experts)

    def repeat(x: Array, layers: Any) -> tuple[Array, list[Any]]:
        ps, index, held = layers
        out = []
        for b in places:
            run = checkpointed(partial(one, b), given.runtime.remat, given.runtime.offload, prevent_cse=loop)
            x, got = run(ps[b], x, index, held[b])
            out.append(got)
        return x, out

    held = [None] * len(places) if memory is None else list(memory)
    if not loop:
        return jax.lax.scan(repeat, x_BTD, ([params[str(b)] for b in places], jnp.arange(cfg.repeats), held))
    outs = []
    for i in range(cfg.repeats):
        picked = [params[str(b)][i] if listed else layer(params[str(b)], i) for b in places]
        x_BTD, got = repeat(x_BTD, (picked, i, layer(held, i)))
        outs.append(got)
    return x_BTD, jax.tree.map(lambda *xs: jnp.stack(xs), *outs)


def run_stacks(
    params: Any,
    stacks: tuple[Stack, ...],
    x_BTD: Float[Array, "B T D"],
    given: Given,
    caches: Caches | None = None,
) -> tuple[Float[Array, "B T D"], Any, Aux]:
    """All stacks in turn. params: those of the level that owns them. Returns x, new cache rows or None, and aux."""
    inputs, x, outs, made = given.inputs, x_BTD, [], []
    memories = None if inputs.memory is None else inputs.memory.rows
    for s, stack in enumerate(stacks):
        held = None if caches is None else caches[s]
        own = given if given.key is None else given._replace(key=jax.random.fold_in(given.key, s))
        memory = None if memories is None else memories[s]
        if stack.shared is not None:
            own = own._replace(shared=_shared(params["shared"][str(s)], stack, x, own))
        x, out = run_stack(params["stacks"][str(s)], stack, x, own, held, memory)
        outs.append(out)
        made.append([kv for kv, _, _ in out] if own.shared is None else [[y.swapaxes(1, 2)[None] for y in own.shared]])
    rows = None
    if caches is not None:
        segment_BT = jnp.ones(x.shape[:2], jnp.int32) if inputs.segment_BT is None else inputs.segment_BT
        rows = tuple(tuple(Rows(k, v, segment_BT) for k, v in places) for places in made)
    taps = _by_layer([[t for _, t, _ in out] for out in outs])
    return x, rows, Aux(taps, _by_layer([[e for _, _, e in out if e] for out in outs]))


def _shared(p: Any, stack: Stack, x_BTD: Float[Array, "B T D"], given: Given) -> tuple[Array, Array]:
    """The keys and values [B, T, K, H] of all layers of a stack, from what enters it."""
    p = use(shared_params(stack, x_BTD.shape[-1]), p, given.runtime.layout, given.runtime.compute_dtype)
    attn = stack.pattern[0].attn
    assert isinstance(attn, GQA) and stack.shared is not None, "checked by Stack"
    return keys_values(p, attn, norm(p["norm"], stack.shared, x_BTD), given)


def forward(
    params: Any,
    spec: Transformer,
    inputs: Inputs,
    runtime: Runtime,
    caches: Caches | None = None,
    key: Array | None = None,
) -> Output:
    """Hidden states of every token, in one pass.

    caches: only read; the new rows come back in `Output.rows` for `cache.commit`. None: no rows are kept.
    key: of dropout; None: none. Ids outside the vocabulary, and learned positions outside their table, give NaN.
    """
    turned = in_ring_order(spec, inputs, runtime)
    x = embed(params, spec, turned, runtime)
    given = Given(turned, tables(params, spec.stacks, turned.position_BT), runtime, spec.causal, key)
    x, rows, aux = run_stacks(params, spec.stacks, x, given, caches)
    if spec.norm is not None:
        x = norm(params["norm"], spec.norm, x)
    if turned is not inputs:
        x, taps = jax.tree.map(partial(in_row_order, runtime=runtime), (x, aux.taps))
        aux = aux.replace(taps=taps)  # type: ignore[attr-defined]
    return Output(x, rows, aux)


def memory_rows(params: Any, spec: Transformer, memory: Memory, runtime: Runtime) -> Memory:
    """The memory with every layer's keys and values made, so that decoding does not make them at every step."""

    def place(cfg: Block, stack: Any, dim: int) -> Any:
        if cfg.cross is None:
            return None
        declared = cross_params(cfg.cross, dim)
        cross = cfg.cross

        def one(p: Any) -> Any:
            return layer_memory(use(declared, p, runtime.layout, runtime.compute_dtype), cross, memory)

        if isinstance(stack, list):
            made = [one(p["cross"]) for p in stack]
            return jax.tree.map(lambda *xs: jnp.stack(xs), *made)
        return jax.lax.map(one, stack["cross"])

    rows = tuple(
        tuple(place(cfg, params["stacks"][str(s)][str(b)], spec.dim) for b, cfg in enumerate(stack.pattern))
        for s, stack in enumerate(spec.stacks)
    )
    return memory.replace(rows=rows)  # type: ignore[attr-defined]


def _by_layer(found: list[list[dict[str, Array]]]) -> dict[str, Array]:
    """[stack][place] -> name -> [L of that place, ...] becomes name -> [all layers in order, ...]."""

    def join(name: str) -> Array:
        stacks = [jnp.stack([d[name] for d in places], 1) for places in found if places]  # [repeats, places, ...]
        return jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in stacks])

    names = {name: None for places in found for d in places for name in d}
    return {name: join(name) for name in names}
