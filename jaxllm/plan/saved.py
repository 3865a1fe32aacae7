"""What the names of `jaxllm.remat` cost and spare: bytes to keep each, FLOPs to make it again. Per token and layer.

A name is kept only where the backward pass reads it: the result of a branch, where what follows is not linear (a norm,
an expert's weight) or is needed for the next branch. So "down" costs nothing in most models, listed or not.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple, assert_never

from jaxllm.cache import window
from jaxllm.config import FFN, GLU, GQA, MLA, MLP, Attention, Block, Longformer, MoE, Transformer
from jaxllm.flops import mean_keys, score_width
from jaxllm.remat import Name, Remat, saved_names
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a compute dtype."""


class Product(NamedTuple):
    """One token's share. numbers: in the compute dtype.  floats: in float32.  flops: to make it again."""

    numbers: int
    flops: float
    floats: int = 0


Products = dict[Name, Product]


def products(block: Block, spec: Transformer, context: int) -> Products:
    """Everything named in a block that its backward pass reads, in rows of `context` tokens."""
    keys = mean_keys(context, window(block.attn.pattern), spec.causal)
    found: Products = {"stream": Product(spec.dim, 0.0)}
    found |= _attention(block.attn, spec.dim, keys) | _feed(block.ffn, spec.dim)
    if block.place in ("parallel", "shared"):
        del found["attention_out"]
    if block.place not in ("sandwich", "post", "output") and not isinstance(block.ffn, MoE):
        del found["down"]
    return found


def _made(inputs: int, outputs: int) -> Product:
    return Product(outputs, 2.0 * inputs * outputs)


def _attention(attn: Attention, dim: int, keys: float) -> Products:
    match attn:
        case GQA() | Longformer():
            kv_heads = attn.kv_heads if isinstance(attn, GQA) else attn.heads
            key = _made(dim, kv_heads * attn.head_dim)
            out = attn.heads * attn.head_dim
            found: Products = {"query": _made(dim, out), "key": key, "value": key}
        case MLA():
            q_rank, out = attn.q_rank or 0, attn.heads * attn.value_dim
            found = {
                "query": _made(q_rank or dim, attn.heads * (attn.nope_dim + attn.rope_dim)),
                "latent": _made(dim, q_rank + attn.kv_rank + attn.rope_dim),
                "key": _made(attn.kv_rank, attn.heads * attn.nope_dim),
                "value": _made(attn.kv_rank, out),
            }
        case other:
            assert_never(other)
    scores = Product(out, 2.0 * score_width(attn) * keys, floats=attn.heads)
    found |= {"attention": scores, "attention_out": _made(out, dim)}
    return found


def _feed(ffn: FFN, dim: int) -> Products:
    match ffn:
        case MLP(hidden):
            return {"up": _made(dim, hidden), "down": _made(hidden, dim)}
        case GLU(hidden):
            return {"gate": _made(dim, hidden), **_feed(MLP(hidden), dim)}
        case MoE(expert=expert, router=router, shared=shared):
            k, beside = router.top_k, {} if shared is None else _feed(shared, dim)
            found: Products = {name: Product(k * p.numbers, k * p.flops) for name, p in _feed(expert, dim).items()}
            for name in beside.keys() - {"down"}:
                own = found.get(name, Product(0, 0.0))
                found[name] = Product(own.numbers + beside[name].numbers, own.flops + beside[name].flops)
            found["router"] = Product(0, 2.0 * dim * ffn.experts, floats=ffn.experts)
            return found
        case other:
            assert_never(other)


def saved_bytes(block: Block, spec: Transformer, context: int, runtime: Runtime) -> tuple[int, int]:
    """Bytes per token that a layer keeps for its backward pass, in HBM and with the host.

    For "none", XLA's choice, as measured.
    """
    layout, c = runtime.layout or Layout(), WIDTH[runtime.compute_dtype]
    names, found = saved_names(runtime.remat), products(block, spec, context)
    if names is None:
        return c * _unnamed(found, spec.dim, layout.tensor), 0
    stream = layout.tensor if layout.split_stream else 1
    ways: dict[Name, int] = dict.fromkeys(("query", "key", "value", "attention", "gate", "up"), layout.tensor)
    ways |= {"stream": stream, "attention_out": stream, "down": stream}

    def size(kept: Set[str]) -> int:
        seen = kept - _lost(block, layout)
        return sum((c * p.numbers + 4 * p.floats) // ways.get(name, 1) for name, p in found.items() if name in seen)

    return size({"stream", *names} - {*runtime.offload}), size({*runtime.offload})


def _lost(block: Block, layout: Layout) -> set[Name]:
    """Names that no policy sees: an exchange between the devices of experts computes a round again by itself."""
    return {"gate", "up", "down"} if layout.expert > 1 and isinstance(block.ffn, MoE) else set()


def _unnamed(found: Products, dim: int, tensor: int) -> int:
    """Numbers per token without recomputation: each product, what stands between them, and some of them twice."""
    numbers = {name: p.numbers for name, p in found.items()}
    heads, kv = numbers["query"], numbers["key"] + numbers["value"]
    up = numbers["up"] + numbers.get("gate", 0)
    return 10 * dim + (6 * heads + 4 * kv + 5 * up // 2) // tensor


def recomputed_flops(block: Block, spec: Transformer, context: int, runtime: Runtime) -> float:
    """FLOPs per token of what the backward pass of a layer makes again."""
    names = saved_names(runtime.remat)
    if names is None:
        return 0.0
    kept = {*names, *runtime.offload} - _lost(block, runtime.layout or Layout())
    return sum(p.flops for name, p in products(block, spec, context).items() if name not in kept)


_LADDER: tuple[tuple[Name, ...], ...] = (
    ("attention",),
    ("key", "value", "latent", "router"),
    ("attention_out",),
    ("query",),
    ("gate",),
    ("up",),
    ("down",),
)
"""What a search saves, one step after another: most FLOPs per byte first, then what is small."""


def ladder(spec: Transformer) -> list[Remat]:
    """Policies worth trying: "full", lists that get longer, and "none"; of names that some block of the model has."""
    blocks = [block for stack in spec.stacks for block in stack.pattern]
    has: set[Name] = {name for block in blocks for name in products(block, spec, 1)}
    lists: list[tuple[Name, ...]] = [()]
    for step in _LADDER:
        lists.append((*lists[-1], *[name for name in step if name in has]))
    return ["full", *dict.fromkeys(lists[1:]), "none"]
