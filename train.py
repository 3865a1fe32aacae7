"""Train: python train.py configs/quickstart.py [steps=200 optimizer.peak_lr=3e-4 ...]. The same as `jaxllm train`."""

import sys

from jaxllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
