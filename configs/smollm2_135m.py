"""SmolLM2-135M's architecture from scratch on a corpus of your own.

    python train.py configs/smollm2_135m.py data.sources.0.path=CORPUS data.tokenizer.path=TOKENIZER run_dir=runs/135m

135 M parameters, 0.9 GFLOP per token forward and backward: 10 billion tokens are 9e18 FLOP, 3.5 hours of a v5e-8 at
45 % MFU. Not trained to the end here. The tokenizer must have at most 49,152 ids.
"""

from jaxllm.experiment import Checkpointing, Data, Experiment, Optimizer, Source
from jaxllm.models.llama import smollm2_135m
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout


def config() -> Experiment:
    """20,000 steps of 256 x 2,048 tokens, ZeRO-1 over all devices."""
    return Experiment(
        smollm2_135m(),
        Data((Source("data/shakespeare.jsonl.gz"),), context=2048, held_out_chars=505_728),
        steps=20_000,
        batch_size=256,
        run_dir="runs/smollm2_135m",
        optimizer=Optimizer(peak_lr=3e-3, warmup_steps=500),
        runtime=Runtime(compute_dtype="bfloat16", remat="attention", layout=Layout(zero=1)),
        checkpoint=Checkpointing(every=1000),
    )
