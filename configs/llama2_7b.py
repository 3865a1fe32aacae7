"""LLaMA-2-7B's shape on a pod slice of 256 chips.

    jaxllm plan configs/llama2_7b.py --topology v5e:16x16
    python train.py configs/llama2_7b.py data.sources.0.path=gs://... data.tokenizer.path=... run_dir=gs://...

FSDP over all chips, two sequences of 4,096 per chip, attention outputs kept.
"""

from jaxllm.experiment import Checkpointing, Data, Experiment, Optimizer, Source
from jaxllm.models.llama import llama2_7b
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout


def config() -> Experiment:
    """2 M tokens per step."""
    return Experiment(
        llama2_7b(),
        Data((Source("data/shakespeare.jsonl.gz"),), context=4096),
        steps=100_000,
        batch_size=512,
        run_dir="runs/llama2_7b",
        optimizer=Optimizer(peak_lr=3e-4, warmup_steps=2000),
        runtime=Runtime(compute_dtype="bfloat16", remat="attention", layout=Layout(zero=3)),
        checkpoint=Checkpointing(every=1000, keep=3),
    )
