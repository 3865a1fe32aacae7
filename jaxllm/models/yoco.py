"""YOCO (Sun et al. 2024, "You Only Cache Once"): a self-decoder of windows, and a cross-decoder whose layers all read
one cache of keys and values, made once from the self-decoder's output.

The self-decoder is the paper's sliding-window variant (section 4.1); gated retention (section 4.2) is not here. There
is no checkpoint format to read. Angles fall from 1 to 1 / theta inclusive, as in the published code: a greater theta.
"""

from __future__ import annotations

from jaxllm.config import GLU, GQA, Block, Embedding, Local, RMSNorm, Rope, Stack, Transformer


def yoco(
    name: str, shape: tuple[int, int, int, int, int, int], window: int, *, theta: float = 10_000.0, context: int
) -> Transformer:
    """shape: (layers, dim, heads, kv_heads, vocab, hidden); half of the layers read the shared keys and values."""
    layers, dim, heads, kv_heads, vocab, hidden = shape
    width, norm = dim // heads, RMSNorm(1e-5)
    rope = Rope(theta ** (width / (width - 2)), interleaved=True)
    near, far = GQA(heads, heads, width, rope, Local(window)), GQA(heads, kv_heads, width, rope)
    below, above = (Block(attn, GLU(hidden, "silu"), norm) for attn in (near, far))
    stacks = (Stack((below,), layers // 2), Stack((above,), layers // 2, shared=norm))
    return Transformer(vocab, dim, stacks, norm, context, Embedding(scale=dim**0.5), name=name)


def yoco_3b() -> Transformer:
    """3,321,661,440 parameters: YOCO-3B's sizes (table 7), windows of 1,024 tokens in place of gated retention."""
    return yoco("yoco_3b", (26, 3072, 24, 8, 100_288, 8192), 1024, context=4096)


PRESETS = (yoco_3b,)
