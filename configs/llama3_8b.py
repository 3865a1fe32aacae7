"""Llama-3.1-8B's shape on a pod slice of 256 chips: what the same code needs there, known before it is paid for.

    jaxllm plan configs/llama3_8b.py --topology v5e:16x16
    python train.py configs/llama3_8b.py data.sources.0.path=gs://... data.tokenizer.path=... run_dir=gs://...

FSDP over all chips, one sequence of 8,192 per chip, full recomputation. docs/benchmarks.md has memory and time.
"""

from jaxllm.experiment import Checkpointing, Data, Experiment, Optimizer, Source
from jaxllm.models.llama import llama31_8b
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout


def config() -> Experiment:
    """2 M tokens per step."""
    return Experiment(
        llama31_8b(),
        Data((Source("data/shakespeare.jsonl.gz"),), context=8192),
        steps=100_000,
        batch_size=256,
        run_dir="runs/llama3_8b",
        optimizer=Optimizer(peak_lr=3e-4, warmup_steps=2000),
        runtime=Runtime(compute_dtype="bfloat16", remat="full", layout=Layout(zero=3)),
        checkpoint=Checkpointing(every=1000, keep=3),
    )
