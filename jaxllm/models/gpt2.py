"""GPT-2 (Radford et al. 2019): pre-norm LayerNorm with biases everywhere, learned positions, tied head."""

from __future__ import annotations

from jaxllm.config import GQA, MLP, Block, LayerNorm, Learned, Transformer, decoder


def gpt2(name: str, layers: int, dim: int, heads: int, vocab: int = 50_257, context: int = 1024) -> Transformer:
    """Head width dim / heads, feed-forward width 4 dim, tanh GELU."""
    attn = GQA(heads, heads, dim // heads, qkv_bias=True, out_bias=True)
    block = Block(attn, MLP(4 * dim, "gelu_tanh", bias=True), LayerNorm())
    stacks = decoder(block, layers=layers)
    return Transformer(vocab, dim, stacks, LayerNorm(), context, embed_position=Learned(context), tied=True, name=name)


def gpt2_small() -> Transformer:
    """124,439,808 parameters."""
    return gpt2("gpt2_small", 12, 768, 12)


def gpt2_medium() -> Transformer:
    """354,823,168 parameters."""
    return gpt2("gpt2_medium", 24, 1024, 16)


def gpt2_large() -> Transformer:
    """774,030,080 parameters."""
    return gpt2("gpt2_large", 36, 1280, 20)


def gpt2_xl() -> Transformer:
    """1,557,611,200 parameters."""
    return gpt2("gpt2_xl", 48, 1600, 25)
