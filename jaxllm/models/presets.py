"""Published models by name, as the family files list them, and toy sizes of them that keep every option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, assert_never

from jaxllm.config import (
    FFN,
    GLU,
    GQA,
    MLA,
    MLP,
    And,
    Attention,
    BigBird,
    Block,
    Cross,
    DynamicNTK,
    EncoderDecoder,
    Llama3,
    Local,
    Longformer,
    LongRope,
    MoE,
    Or,
    Pattern,
    Rope,
    Scaling,
    Transformer,
    Yarn,
)
from jaxllm.models.families import modules

EVERY: dict[str, Callable[[], Any]] = {make.__name__: make for m in modules() for make in getattr(m, "PRESETS", ())}
PRESETS: dict[str, Callable[[], Transformer]] = {n: f for n, f in EVERY.items() if isinstance(f(), Transformer)}
ENCODER_DECODERS: dict[str, Callable[[], EncoderDecoder]] = {
    name: make for name, make in EVERY.items() if isinstance(make(), EncoderDecoder)
}


def toy(spec: Transformer, *, dim: int = 48, vocab: int = 97, window: int = 5, repeats: int = 2) -> Transformer:
    """The same architecture at toy size: 4 query heads of width 16 (so H != D / N), K < N wherever the model has it.

    Windows shrink to `window` tokens, the vocabulary to `vocab`, learned positions and the context to 64.
    """

    def shrink(pattern: Pattern) -> Pattern:
        match pattern:
            case Local():
                return Local(window)
            case BigBird():
                return replace(pattern, block=2)
            case And(left, right):
                return And(shrink(left), shrink(right))
            case Or(left, right):
                return Or(shrink(left), shrink(right))
            case _:
                return pattern

    def small(block: Block) -> Block:
        cross = block.cross if block.cross is None else Cross(_small_gqa(block.cross.attn), dim)
        attn = _small_attention(block.attn, window)
        attn = attn if isinstance(attn, Longformer) else replace(attn, pattern=shrink(attn.pattern))
        return replace(block, attn=attn, ffn=_small_ffn(block.ffn), cross=cross)

    stacks = tuple(
        replace(s, pattern=tuple(map(small, s.pattern)), repeats=min(repeats, s.repeats)) for s in spec.stacks
    )
    e = spec.embed
    embed = replace(
        e,
        position=None if e.position is None else replace(e.position, length=64),
        scale=None if e.scale is None else dim**0.5,
        dim=None if e.dim is None else dim // 2,
    )
    return replace(spec, vocab=vocab, dim=dim, stacks=stacks, context=64, embed=embed, name=f"toy_{spec.name}")


def toy_encoder_decoder(spec: EncoderDecoder) -> EncoderDecoder:
    """Both halves at toy size."""
    return EncoderDecoder(toy(spec.encoder), toy(spec.decoder), min(spec.start, 3), f"toy_{spec.name}")


def _small_attention(attn: Attention, window: int) -> Attention:
    match attn:
        case Longformer():
            return Longformer(4, 16, window - 1)
        case GQA():
            return _small_gqa(attn)
        case MLA():
            ranks = {"q_rank": None if attn.q_rank is None else 20, "kv_rank": 24}
            return replace(
                attn, heads=4, nope_dim=12, rope_dim=8, value_dim=16, position=_small_rope(attn.position, 8), **ranks
            )
        case other:
            assert_never(other)


def _small_gqa(attn: GQA) -> GQA:
    kv = {True: 4, False: 1 if attn.kv_heads == 1 else 2}[attn.kv_heads == attn.heads]
    position = _small_rope(attn.position, 16) if isinstance(attn.position, Rope) else attn.position
    return replace(attn, heads=4, kv_heads=kv, head_dim=16, position=position)


def _small_rope(rope: Rope, width: int) -> Rope:
    """The same rotation for heads of `width`, its long-context scaling begun after 8 tokens."""
    rope = replace(rope, fraction=max(2.0 / width, round(rope.fraction * width / 2) * 2 / width))
    pairs = rope.width(width) // 2
    sections = None if rope.sections is None else _shares(rope.sections, pairs)
    match rope.scaling:
        case LongRope(short, long):
            scaling: Scaling | None = replace(rope.scaling, short=short[:pairs], long=long[:pairs], original=8)
        case DynamicNTK() | Yarn() | Llama3():
            scaling = replace(rope.scaling, original=8)
        case other:
            scaling = other
    return replace(rope, scaling=scaling, sections=sections)


def _shares(sections: tuple[int, ...], pairs: int) -> tuple[int, ...]:
    rest = [max(1, s * pairs // sum(sections)) for s in sections[1:]]
    return (pairs - sum(rest), *rest)


def _small_ffn(ffn: FFN) -> FFN:
    match ffn:
        case MLP() | GLU():
            return replace(ffn, hidden=64)
        case MoE(expert=expert, router=r, shared=shared):
            groups = 2 if r.groups > 1 else 1
            router = replace(r, top_k=min(r.top_k, 3 if groups == 1 else 2), groups=groups, top_groups=1)
            shared = None if shared is None else replace(shared, hidden=40)
            return replace(ffn, expert=replace(expert, hidden=24), experts=8, router=router, shared=shared)
        case other:
            assert_never(other)
