"""DeepNorm against plain post-norm: 100 layers, same init scheme, same data, same optimiser.

    python benchmarks/deepnorm.py [--out docs/deepnorm.png]

About 4 minutes on 2 CPU cores. Expected: post-norm stays at the loss of guessing by frequency (its gradients vanish on
the way down), DeepNorm learns (Wang et al. 2022, §2 and fig. 1).
"""

from __future__ import annotations

import argparse
import gzip
import json
from functools import partial
from pathlib import Path

import jax
import matplotlib
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from jaxllm.config import GQA, MLP, Block, Embedding, LayerNorm, Learned, Transformer, deepnorm
from jaxllm.config import decoder as decoder_of
from jaxllm.objectives.lm import lm_loss
from jaxllm.params import init
from jaxllm.records import Batch
from jaxllm.runtime import Runtime
from jaxllm.transformer import transformer_params

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LAYERS, DIM, CONTEXT, BATCH, STEPS, VOCAB = 100, 32, 32, 8, 400, 128
RATE = 1e-3
TEXT = Path(__file__).parents[1] / "data" / "shakespeare.jsonl.gz"


def spec(residual_scale: float, gain: float) -> Transformer:
    """100 post-norm layers of width 32 on characters."""
    attn = GQA(2, 2, DIM // 2)
    block = Block(attn, MLP(4 * DIM), LayerNorm(), "post", residual_scale=residual_scale, gain=gain)
    embed = Embedding(Learned(CONTEXT))
    return Transformer(VOCAB, DIM, decoder_of(block, layers=LAYERS), None, CONTEXT, embed)


def batches(text: np.ndarray) -> list[Batch]:
    """The same batches for every model."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(STEPS):
        rows = np.stack([text[i : i + CONTEXT + 1] for i in rng.integers(0, len(text) - CONTEXT - 1, BATCH)])
        ones = np.ones((BATCH, CONTEXT), np.int32)
        position = np.broadcast_to(np.arange(CONTEXT, dtype=np.int32), ones.shape)
        out.append(Batch(rows[:, :-1], rows[:, 1:], ones.astype(np.float32), ones, position, ones * 0))
    return out


def train(model: Transformer, data: list[Batch]) -> list[float]:
    """Losses in nats per character."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, RATE, 50)))
    params = init(transformer_params(model), jax.random.key(0))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        (loss, _), grads = jax.value_and_grad(lm_loss, has_aux=True)(params, model, batch, Runtime())
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for batch in data:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return losses


def main() -> None:
    """Train both and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/deepnorm.png")
    args = parser.parse_args()
    with gzip.open(TEXT, "rt") as lines:
        text = json.loads(next(lines))["text"]
    data = batches(np.array([min(ord(c), VOCAB - 1) for c in text], np.int32))
    scale, gain = deepnorm(LAYERS)
    runs = {"post-norm": spec(1.0, 1.0), f"DeepNorm, alpha {scale:.2f}, beta {gain:.2f}": spec(scale, gain)}
    losses = {name: train(model, data) for name, model in runs.items()}
    table = Table("run", "first 20 steps", "last 20 steps", title=f"{LAYERS} layers, nats per character")
    for name, values in losses.items():
        table.add_row(name, f"{np.mean(values[:20]):.3f}", f"{np.mean(values[-20:]):.3f}")
        plt.plot(np.convolve(values, np.ones(10) / 10, "valid"), label=name)
    Console().print(table)
    plt.xlabel("step")
    plt.ylabel("nats per character")
    plt.title(f"{LAYERS} layers of width {DIM}")
    plt.legend()
    plt.grid(alpha=0.3)
    plt.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
