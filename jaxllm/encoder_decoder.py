"""Encoder-decoders: two transformers around one embedding.

params = {"tokens": [V, D], "encoder": {...}, "decoder": {...}}: each half as `transformer_params` has it, but without
embed/tokens, which both read.

    memory = encode(params, spec, inputs(source), runtime)
    out = forward(params, spec, inputs(source), inputs(target), runtime)
    logits(params, spec, out.hidden_BTD, runtime)
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Array, Float

from jaxllm import transformer
from jaxllm.cache import Caches
from jaxllm.config import EncoderDecoder
from jaxllm.params import ParamTree
from jaxllm.records import Inputs, Memory, Output
from jaxllm.runtime import Runtime


def encoder_decoder_params(spec: EncoderDecoder) -> ParamTree:
    """tokens [V, D], encoder/..., decoder/..."""
    halves = {"encoder": spec.encoder, "decoder": spec.decoder}
    declared = {name: transformer.transformer_params(half) for name, half in halves.items()}
    return {"tokens": declared["encoder"]["embed"]["tokens"]} | {name: _own(tree) for name, tree in declared.items()}


def _own(tree: ParamTree) -> ParamTree:
    embed = {name: p for name, p in tree["embed"].items() if name != "tokens"}
    rest = {name: p for name, p in tree.items() if name != "embed"}
    return rest | ({"embed": embed} if embed else {})


def half(params: Any, which: Literal["encoder", "decoder"]) -> Any:
    """The parameters of one half, complete with the shared embedding. No array is copied."""
    own = params[which]
    return own | {"embed": own.get("embed", {}) | {"tokens": params["tokens"]}}


def encode(params: Any, spec: EncoderDecoder, source: Inputs, runtime: Runtime, key: Array | None = None) -> Memory:
    """What the decoder's layers attend to. Segments of `source` hide its padding, and nothing else."""
    out = transformer.forward(half(params, "encoder"), spec.encoder, source, runtime, key=key)
    return Memory(out.hidden_BTD, source.segment_BT)


def memory_rows(params: Any, spec: EncoderDecoder, memory: Memory, runtime: Runtime) -> Memory:
    """`memory` with the keys and values of every layer, made once for all steps of decoding."""
    return transformer.memory_rows(half(params, "decoder"), spec.decoder, memory, runtime)


def forward(
    params: Any,
    spec: EncoderDecoder,
    source: Inputs,
    target: Inputs,
    runtime: Runtime,
    caches: Caches | None = None,
    key: Array | None = None,
) -> Output:
    """Hidden states of the decoder, [B, T, D] for T tokens of `target`, whose own memory (if any) saves encoding."""
    if target.memory is None:
        target = target.replace(memory=encode(params, spec, source, runtime, key))  # type: ignore[attr-defined]
    return transformer.forward(half(params, "decoder"), spec.decoder, target, runtime, caches, key)


def logits(
    params: Any, spec: EncoderDecoder, hidden_BTD: Float[Array, "B T D"], runtime: Runtime
) -> Float[Array, "B T V"]:
    """float32 [B, T, V]."""
    return transformer.logits(half(params, "decoder"), spec.decoder, hidden_BTD, runtime)
