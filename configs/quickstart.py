"""A small transformer on the complete works of Shakespeare.

    python train.py configs/quickstart.py

About 4 minutes on two CPU cores, under a minute on a GPU or TPU. Expect a validation loss below 2.2 bits per byte over
the last tenth of the corpus (a widely used minimal trainer's CPU recipe reaches 2.73), and samples like plays.
"""

from jaxllm.config import GLU, GQA, Block, RMSNorm, Rope, Transformer, decoder
from jaxllm.experiment import Checkpointing, Data, Experiment, Optimizer, Source
from jaxllm.runtime import Runtime


def config() -> Experiment:
    """4 layers of width 256, a vocabulary of 4,096, 1,000 steps of 4,096 tokens."""
    block = Block(GQA(4, 4, 64, position=Rope()), GLU(768), RMSNorm())
    model = Transformer(4096, 256, decoder(block, layers=4), RMSNorm(), context=256, tied=True, name="quickstart")
    data = Data((Source("data/shakespeare.jsonl.gz"),), context=256, held_out_chars=505_728)
    return Experiment(
        model,
        data,
        steps=1000,
        batch_size=16,
        run_dir="runs/quickstart",
        optimizer=Optimizer(peak_lr=2e-3, warmup_steps=50),
        runtime=Runtime(),
        eval_every=250,
        checkpoint=Checkpointing(every=250),
        samples=("ROMEO.\n", "First Citizen.\n", "KING.\nMy lord,"),
    )
