"""BART's halves, and the names of what lies in them."""

from __future__ import annotations

from jaxllm.config import (
    GQA,
    MLP,
    Activation,
    Block,
    Cross,
    Embedding,
    LayerNorm,
    LMHead,
    Transformer,
    decoder,
)
from jaxllm.models.bert_like import dense, normed, projection
from jaxllm.models.common import Row


def half(
    vocab: int, dim: int, shape: tuple[int, int, int], act: Activation, embed: Embedding, head: LMHead | None, own: bool
) -> Transformer:
    """shape: layers, heads, feed-forward width.  own: the decoder."""
    layers, heads, hidden = shape
    attn = GQA(heads, heads, dim // heads, qkv_bias=True, out_bias=True)
    cross = Cross(attn, dim) if own else None
    block = Block(attn, MLP(hidden, act, bias=True), LayerNorm(), "post", cross)
    size = 0 if embed.position is None else embed.position.length
    return Transformer(vocab, dim, decoder(block, layers=layers), None, size, embed, head, own, name="bart")


def attention_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """Projections with biases, and the norm after them."""
    return (
        *(row for n in "qkv" for row in projection(f"{theirs}.{n}_proj", f"{ours}/{n}")),
        *dense(f"{theirs}.out_proj", f"{ours}/o", "D (N H) -> N H D"),
        *normed(f"{theirs}_layer_norm", f"{ours}_norm"),
    )


FFN: tuple[Row, ...] = (*dense("fc1", "ffn/up"), *dense("fc2", "ffn/down"), *normed("final_layer_norm", "ffn_norm"))
HEAD: tuple[Row, ...] = (("lm_head.weight", "head/kernel", None), ("final_logits_bias", "head/bias", "A V -> (A V)"))
