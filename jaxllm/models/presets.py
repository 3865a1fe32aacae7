"""Published models by name, and toy sizes of them that keep every option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jaxllm.config import GLU, GQA, MLP, And, Block, Local, Or, Pattern, Stack, Transformer
from jaxllm.models import gemma2, gpt2, llama

PRESETS: dict[str, Callable[[], Transformer]] = {
    f.__name__: f
    for f in (
        llama.llama2_7b,
        llama.llama3_8b,
        llama.llama31_8b,
        llama.llama3_70b,
        llama.llama32_1b,
        llama.smollm2_135m,
        llama.qwen2_05b,
        gpt2.gpt2_small,
        gpt2.gpt2_medium,
        gpt2.gpt2_large,
        gpt2.gpt2_xl,
        gemma2.gemma2_2b,
    )
}


def toy(spec: Transformer, *, dim: int = 48, vocab: int = 97, window: int = 5, repeats: int = 2) -> Transformer:
    """The same architecture at toy size: 4 query heads of width 16 (so H != D / N), K < N wherever the model has it.

    Windows shrink to `window` tokens, the vocabulary to `vocab`, learned positions and the context to 64.
    """

    def shrink(pattern: Pattern) -> Pattern:
        match pattern:
            case Local():
                return Local(window)
            case And(left, right):
                return And(shrink(left), shrink(right))
            case Or(left, right):
                return Or(shrink(left), shrink(right))
            case _:
                return pattern

    def small(block: Block) -> Block:
        kv = {True: 4, False: 1 if block.attn.kv_heads == 1 else 2}[block.attn.kv_heads == block.attn.heads]
        attn: GQA = replace(block.attn, heads=4, kv_heads=kv, head_dim=16, pattern=shrink(block.attn.pattern))
        ffn: MLP | GLU = replace(block.ffn, hidden=64)
        return replace(block, attn=attn, ffn=ffn)

    stacks = tuple(Stack(tuple(map(small, s.pattern)), min(repeats, s.repeats)) for s in spec.stacks)
    learned = None if spec.embed_position is None else replace(spec.embed_position, length=64)
    scale = None if spec.embed_scale is None else dim**0.5
    toy_spec = replace(spec, vocab=vocab, dim=dim, stacks=stacks, context=64, name=f"toy_{spec.name}")
    return replace(toy_spec, embed_position=learned, embed_scale=scale)
