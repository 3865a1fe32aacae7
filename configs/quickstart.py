"""A small transformer on the complete works of Shakespeare.

    python train.py configs/quickstart.py

2.2 million parameters, about 4 minutes on two CPU cores. Expect a validation loss near 2.26 bits per byte over the last
tenth of the corpus (a widely used minimal trainer's CPU recipe reaches 2.73), and samples that read like plays.
"""

from jaxllm.config import GLU, GQA, Block, LMHead, RMSNorm, Rope, Transformer, decoder
from jaxllm.experiment import Checkpointing, Data, Experiment, Optimizer, Source
from jaxllm.runtime import Runtime


def config() -> Experiment:
    """4 layers of width 192, a vocabulary of 2,048, 1,600 steps of 1,024 tokens."""
    block = Block(GQA(3, 3, 64, position=Rope()), GLU(512), RMSNorm())
    model = Transformer(
        2048, 192, decoder(block, layers=4), RMSNorm(), context=128, head=LMHead(tied=True), name="quickstart"
    )
    return Experiment(
        model,
        Data((Source("data/shakespeare.jsonl.gz"),), context=128, held_out_chars=505_728),
        steps=1600,
        batch_size=8,
        run_dir="runs/quickstart",
        optimizer=Optimizer(peak_lr=4e-3, warmup_steps=50, end_fraction=0.02),
        runtime=Runtime(),
        eval_every=400,
        checkpoint=Checkpointing(every=400),
        samples=("ROMEO.\n", "KING.\nMy lord,", "Enter the Ghost.\n"),
    )
