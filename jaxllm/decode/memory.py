"""Prompts of encoder-decoders: read once by the encoder, then a memory with keys and values for every decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxllm.config import EncoderDecoder, Transformer, VisionLanguage
from jaxllm.encoder_decoder import encode, half
from jaxllm.records import Memory, Params, inputs
from jaxllm.runtime import Runtime
from jaxllm.transformer import memory_rows


def part_that_speaks(spec: Transformer | VisionLanguage | EncoderDecoder) -> Transformer:
    """The decoder that tokens come from."""
    match spec:
        case Transformer():
            return spec
        case VisionLanguage(text=text):
            return text
        case EncoderDecoder(decoder=decoder):
            return decoder
        case other:
            assert_never(other)


def text_half(spec: Transformer | VisionLanguage | EncoderDecoder, params: Params) -> tuple[Transformer, Params]:
    """The part that speaks and its parameters."""
    own = part_that_speaks(spec)
    match spec:
        case Transformer():
            return own, params
        case VisionLanguage():
            return own, params["text"]
        case EncoderDecoder():
            return own, half(params, "decoder")
        case other:
            assert_never(other)


def read(
    spec: EncoderDecoder, decoder: Transformer, params: tuple[Any, Any], runtime: Runtime, prompts: Sequence[Any]
) -> Memory:
    """The memory of these prompts, padded to a common width.

    decoder: that of `spec`, or the same with every layer a place of its own.  params: of the whole and of `decoder`.
    Raises ValueError for a prompt that is empty, longer than the encoder's positions, or has ids it does not know.
    """
    position = spec.encoder.embed.position
    most = None if position is None else position.length
    for i, prompt in enumerate(prompts):
        if not len(prompt) or min(prompt) < 0 or max(prompt) >= spec.vocab:
            raise ValueError(f"generate: prompt {i} needs ids in 0..{spec.vocab - 1}, found {list(prompt)[:8]}")
        if most is not None and len(prompt) > most:
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens, the encoder {most} positions; cut it")
    width = -(-max(map(len, prompts)) // 32) * 32
    width = width if most is None else min(width, most)
    rows = [np.pad(np.asarray(prompt, np.int32), (0, width - len(prompt))) for prompt in prompts]
    real = np.arange(width)[None] < np.array([[len(prompt)] for prompt in prompts])
    return _read(spec, decoder, runtime, params, jnp.asarray(np.stack(rows)), jnp.asarray(real, jnp.int32))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _read(
    spec: EncoderDecoder,
    decoder: Transformer,
    runtime: Runtime,
    params: tuple[Any, Any],
    ids_BS: Int[Array, "B S"],
    mask_BS: Int[Array, "B S"],
) -> Memory:
    memory = encode(params[0], spec, inputs(ids_BS, mask_BS), runtime)
    return memory_rows(params[1], decoder, memory, runtime)
