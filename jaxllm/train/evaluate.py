"""Validation: the loss of held-out text per channel, and bits per byte, which no tokenizer can flatter."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxllm.config import Transformer
from jaxllm.data import source as sources
from jaxllm.data.corpus import Corpus
from jaxllm.data.packing import Packing
from jaxllm.data.source import Finite
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.mesh import make_mesh
from jaxllm.objectives.lm import lm_loss
from jaxllm.records import Batch
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout
from jaxllm.train.dataset import validation_batch
from jaxllm.train.metrics import by_channel

Evaluate = Callable[[Any, Batch], tuple[Array, Array]]


def make_evaluate(spec: Transformer, runtime: Runtime, channels: int) -> Evaluate:
    """Jitted (params, batch) -> (channel_nll, channel_weight), sums [channels]."""

    @jax.jit
    def run(params: Any, batch: Batch) -> tuple[Array, Array]:
        _, aux = lm_loss(params, spec, batch, runtime, channels=channels)
        return aux["channel_nll"], aux["channel_weight"]

    return run


def evaluate(
    run: Evaluate, params: Any, finite: Finite, sharding: NamedSharding, say: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """val/loss (nats per token), val/bits_per_byte, val/perplexity, and the first two by channel.

    Bits per byte = total nats / ln 2 / UTF-8 bytes of the text, over the whole held-out part.
    """
    nll = np.zeros(len(finite.source.channels))
    weight = np.zeros_like(nll)
    for i in range(len(finite)):
        part = jax.device_get(run(params, validation_batch(finite, i, sharding)))
        nll, weight = nll + part[0], weight + part[1]
        if (i + 1) % max(1, len(finite) // 10) == 0:
            say(f"batch {i + 1}/{len(finite)}: loss so far {nll.sum() / max(weight.sum(), 1):.4f}")
    counts = finite.source.shards.manifest["counts"]
    channels = finite.source.channels
    size = np.array([counts[name]["bytes"] if name in counts else 0 for name in channels], float)
    mean, bits = partial(by_channel, channels, nll), nll / math.log(2)
    loss = float(nll.sum() / weight.sum())
    return {
        "val/loss": loss,
        "val/perplexity": math.exp(min(loss, 700.0)),
        "val/bits_per_byte": float(bits.sum() / size.sum()),
        **mean(weight, "val/loss"),
        **by_channel(channels, bits, size, "val/bits_per_byte"),
    }


def evaluate_corpus(
    spec: Transformer,
    params: Any,
    tokenizer: Tokenizer | None,
    corpus: str,
    *,
    context: int | None = None,
    batch_size: int = 8,
    runtime: Runtime = Runtime(),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """What `evaluate` gives, for any corpus: documents are packed into rows of `context` tokens, without overlap.

    context: default the model's own, at most 2,048. Raises ValueError when it exceeds the model's, or there is no
    tokenizer.
    """
    context = min(spec.context, 2048) if context is None else context
    if not 0 < context <= spec.context:
        raise ValueError(f"eval: context={context} must be between 1 and the model's {spec.context}")
    if tokenizer is None:
        raise ValueError("eval: this model has no tokenizer; add its tokenizer files to the folder")
    mesh = make_mesh(Layout(data=1), jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder:
        source = sources.prepare(
            "eval", Corpus(corpus), tokenizer, epath.Path(folder) / "shards", Packing(context), progress=say
        )
        finite = Finite(source, min(batch_size, source.rows))
        run = make_evaluate(spec, runtime, len(source.channels))
        return evaluate(run, params, finite, NamedSharding(mesh, PartitionSpec()), say)
