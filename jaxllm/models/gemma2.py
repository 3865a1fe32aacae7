"""Gemma 2 (Riviere et al. 2024): sandwich norms with unit offset, windows on every other layer, soft-capped logits."""

from __future__ import annotations

from dataclasses import replace

from jaxllm.config import GLU, GQA, Block, Local, RMSNorm, Rope, Transformer, decoder


def gemma2_2b() -> Transformer:
    """2,614,341,888 parameters, tied. Local layers come first, with a window of 4,096."""
    norm = RMSNorm(1e-6, unit_offset=True)
    attn = GQA(8, 4, 256, position=Rope(), softcap=50.0, scale=256**-0.5)
    globl = Block(attn, GLU(9216, "gelu_tanh"), norm, place="sandwich")
    local = replace(globl, attn=replace(attn, pattern=Local(4096)))
    return Transformer(
        vocab=256_000,
        dim=2304,
        stacks=decoder(local, globl, layers=26),
        norm=norm,
        context=8192,
        embed_scale=2304**0.5,
        tied=True,
        logit_softcap=30.0,
        name="gemma2_2b",
    )
