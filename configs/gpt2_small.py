"""GPT-2 small (124 M parameters) from scratch on a corpus of your own.

    python train.py configs/gpt2_small.py data.sources.0.path=CORPUS data.tokenizer.path=TOKENIZER run_dir=runs/gpt2

0.8 GFLOP per token: 10 billion tokens are 8e18 FLOP, 3 hours of a v5e-8 at 45 % MFU. Not trained to the end here;
others reach about 3.2 nats per token on web text with GPT-2's own tokenizer (50,257 ids).
"""

from jaxllm.experiment import Checkpointing, Data, Experiment, Optimizer, Source
from jaxllm.models.gpt2 import gpt2_small
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout


def config() -> Experiment:
    """19,000 steps of 512 x 1,024 tokens, as a widely used recipe for this model."""
    return Experiment(
        gpt2_small(),
        Data((Source("data/shakespeare.jsonl.gz"),), context=1024, held_out_chars=505_728),
        steps=19_000,
        batch_size=512,
        run_dir="runs/gpt2_small",
        optimizer=Optimizer(peak_lr=6e-4, warmup_steps=700),
        runtime=Runtime(compute_dtype="bfloat16", remat="attention", layout=Layout(zero=1)),
        checkpoint=Checkpointing(every=1000),
    )
