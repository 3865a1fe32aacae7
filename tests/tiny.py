"""A run that takes seconds: one block of width 16 on two short texts."""

import json
from dataclasses import replace

from jaxllm.config import GLU, GQA, Block, LMHead, RMSNorm, Rope, Transformer, decoder
from jaxllm.experiment import Checkpointing, Data, Experiment, Optimizer, Source, resolve

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards brew a potion of foxglove and jam".split()  # noqa: SIM905


def corpus(folder):
    """60 documents in two channels."""
    file = folder / "corpus.jsonl"
    lines = []
    for i in range(60):
        text = " ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(40 + i))
        lines.append(json.dumps({"text": text + "\n", "channel": ("even", "odd")[i % 2]}))
    file.write_text("\n".join(lines))
    return str(file)


def experiment(folder, **changes):
    """Resolved; `folder` holds the corpus and the run."""
    block = Block(GQA(2, 1, 8, position=Rope()), GLU(32), RMSNorm())
    base = Experiment(
        Transformer(300, 16, decoder(block, layers=2), RMSNorm(), context=32, head=LMHead(tied=True), name="tiny"),
        Data((Source(corpus(folder)),), context=32, held_out_chars=1500),
        steps=12,
        batch_size=8,
        run_dir=str(folder / "run"),
        optimizer=Optimizer(peak_lr=1e-2, warmup_steps=2),
        log_every=2,
        eval_every=6,
        checkpoint=Checkpointing(every=4),
        samples=("the quick",),
    )
    return resolve(replace(base, **changes))
