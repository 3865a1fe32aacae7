"""jaxllm: language models in JAX. The math is a page you can read, and the same page runs on a laptop and a TPU pod.

    import jaxllm

    model = jaxllm.load("smollm2")      # a run directory, a checkpoint in it, a Hugging Face folder, a .gguf, a name
    jaxllm.logits(model.spec, model.params, input_ids, attention_mask)           # float32 [B, T, V]
    jaxllm.logits(t5.spec, t5.params, source_ids, mask, decoder_input_ids=ids)   # of an encoder-decoder
    jaxllm.classify(bert.spec, bert.params, "nsp", input_ids, attention_mask)    # [B, labels]; jaxllm.hidden_states ...
    jaxllm.embed(jaxllm.load("all-minilm-l6-v2"), ["a sentence", "another"])     # [2, D], each of length 1
    jaxllm.similarity(clip.spec, clip.params, input_ids, attention_mask, pixel_values=pixels).logits_per_image
    jaxllm.generate(model.spec, model.params, [[1, 2, 3]], max_new_tokens=20).ids()
    for piece in jaxllm.stream(model, "Once upon"): ...                          # pieces of text

These names are stable. The rooms below them (`docs/architecture.md`) are public too, and may still move.
"""

from jaxllm.apply import classify, hidden_states, logits, similarity
from jaxllm.decode.rules import Sampling
from jaxllm.decode.sample import Generation, generate
from jaxllm.decode.stream import stream
from jaxllm.model import Model, embed, load, spec_of
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout

__all__ = [
    "Generation",
    "Layout",
    "Model",
    "Runtime",
    "Sampling",
    "classify",
    "embed",
    "generate",
    "hidden_states",
    "load",
    "logits",
    "similarity",
    "spec_of",
    "stream",
]
