"""SmolLM2-135M on this CPU, against PyTorch and transformers on the same weights, turn by turn.

    python benchmarks/cpu_vs_torch.py MODEL_DIR --torch-python PY --bench-torch bench_torch.py [--rounds 3]

MODEL_DIR is a Hugging Face folder that both sides read. PY is a Python with torch and transformers; bench_torch takes
`MODEL_DIR MODE --dtypes D --threads N --reps R --out FILE` and writes JSON with a list `results` of `name` and
`tok_s_best`. About 3 minutes per round on 2 idle cores. The two take turns, since a shared machine's speed drifts; the
printed ratio of each row is the median over rounds of (our best dtype / its best dtype).
Expected on 2 idle cores of a Zen 4 server: see docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxllm import model as models
from jaxllm.decode.rules import Sampling
from jaxllm.decode.sample import Feed, Program, bucket, fill, generate, layered, prepare
from jaxllm.experiment import Optimizer
from jaxllm.objectives.lm import lm_loss
from jaxllm.records import Batch
from jaxllm.runtime import Runtime
from jaxllm.train.optimizer import make_optimizer
from jaxllm.train.step import init_state, make_step
from jaxllm.transformer import logits, transformer_params

ROWS = ("prefill 1x512", "decode batch 1", "decode batch 8", "train 4x256")
MODES = {"prefill": ROWS[:1], "decode": ROWS[1:3], "train": ROWS[3:]}
PROMPT, NEW = 32, 128  # tokens, as in the reference script


def main() -> None:
    """Take turns, then print a table; `--ours` is one turn of ours, in a child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--torch-python")
    parser.add_argument("--bench-torch")
    parser.add_argument("--modes", default="prefill,decode,train")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", help="write the figures as JSON")
    parser.add_argument("--ours", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        Path(args.ours).write_text(json.dumps(ours(args.model, args.modes.split(","), args.dtypes.split(","))))
        return
    if not (args.torch_python and args.bench_torch):
        parser.error("--torch-python and --bench-torch are needed")
    rounds = [one_round(args, mode) for _ in range(args.rounds) for mode in args.modes.split(",")]
    show(rounds, Console())
    if args.out:
        Path(args.out).write_text(json.dumps(rounds, indent=1))


def one_round(args: argparse.Namespace, mode: str) -> dict[str, dict[str, dict[str, float]]]:
    """{"ours" | "torch": {row: {dtype: tokens per second}}}, from two child processes one after the other."""
    common = [args.model, "--dtypes", args.dtypes]
    torch = [args.torch_python, args.bench_torch, args.model, mode, "--dtypes", args.dtypes]
    torch += ["--threads", str(args.threads), "--reps", "2"]
    mine = [sys.executable, __file__, *common, "--modes", mode]
    found = {"torch": {}, "ours": child([*mine, "--ours"])}
    for result in child([*torch, "--out"])["results"]:
        name, dtype = (
            result["name"],
            "bfloat16" if "bf16" in result["name"] or "bfloat16" in result["name"] else "float32",
        )
        row = next((r for r in ROWS if name.startswith(r)), None)
        if row is not None and "all logits" not in name:
            best = found["torch"].setdefault(row, {})
            best[dtype] = max(best.get(dtype, 0.0), result["tok_s_best"])
    print(json.dumps(found), flush=True)
    return found


def child(command: list[str]) -> Any:
    """Run `command FILE` and read the JSON it leaves in FILE."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        subprocess.run([*command, str(out)], check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def show(rounds: list[dict[str, Any]], console: Console) -> None:
    """Best figures of each dtype over all rounds, and the median over rounds of the ratio of the best dtypes."""
    table = Table("tokens per second", "ours fp32", "ours bf16", "torch fp32", "torch bf16", "ratio", box=None)
    for row in ROWS:
        seen = [r for r in rounds if row in r["ours"] and row in r["torch"]]
        if seen:
            cells = [
                max(r[who][row].get(d, 0) for r in seen) for who in ("ours", "torch") for d in ("float32", "bfloat16")
            ]
            # A training row compares fp32 with fp32: that is the bar; the others each side's best dtype.
            pick = (lambda by: by["float32"]) if row.startswith("train") else (lambda by: max(by.values()))
            ratio = statistics.median(pick(r["ours"][row]) / pick(r["torch"][row]) for r in seen)
            table.add_row(row, *(f"{c:,.1f}" for c in cells), f"{ratio:.2f}")
    console.print(table)


# ------------------------------------------------------------------------------------------------------------ ours


def ours(path: str, modes: list[str], dtypes: list[str]) -> dict[str, dict[str, float]]:
    """{row: {dtype: tokens per second}}, best of 3 after a warm-up."""
    model = models.load(path)
    found: dict[str, dict[str, float]] = {}
    for dtype in dtypes:
        runtime = Runtime(compute_dtype=dtype)  # type: ignore[arg-type]
        ready = prepare(model.params, model.spec, runtime)
        for mode in modes:
            cases = {"prefill": prefill, "decode": decode, "train": train}[mode](model, ready, runtime)
            for row, (tokens, run) in cases.items():
                found.setdefault(row, {})[dtype] = tokens / best_seconds(run)
    return found


Case = dict[str, tuple[int, Callable[[], Any]]]


def best_seconds(run: Callable[[], Any], reps: int = 3) -> float:
    """Wall time of the best of `reps` calls, after one more."""
    times = []
    for _ in range(reps + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def ids(model: models.Model, rows: int, length: int) -> np.ndarray:
    """Random ids above the control tokens."""
    return np.random.default_rng(0).integers(100, model.spec.vocab, (rows, length)).astype(np.int32)


def prefill(model: models.Model, ready: Any, runtime: Runtime) -> Case:
    """512 tokens into a cache, logits of the last one."""
    spec, ready = layered(model.spec, ready)
    program = Program(spec, runtime, Sampling(), (), bucket(512))

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> Any:
        feed = Feed(tokens, jnp.zeros(1, jnp.int32), jnp.full(1, 512, jnp.int32))
        hidden, caches = fill(program, params, None, feed)
        return logits(params, spec, hidden[:, None], runtime), caches

    return {"prefill 1x512": (512, partial(run, ready, ids(model, 1, 512)))}


def decode(model: models.Model, ready: Any, runtime: Runtime) -> Case:
    """128 greedy tokens after a prompt of 32, as `generate` does it, the prompt included in the time."""

    def run(rows: int) -> Any:
        prompts = ids(model, rows, PROMPT).tolist()
        return generate(model.spec, ready, prompts, max_new_tokens=NEW, runtime=runtime).tokens_BT

    return {f"decode batch {rows}": (rows * NEW, partial(run, rows)) for rows in (1, 8)}


def train(model: models.Model, ready: Any, runtime: Runtime) -> Case:
    """One step of AdamW on 4 rows of 256 tokens, fp32 masters."""
    tree = transformer_params(model.spec)
    optimizer = make_optimizer(Optimizer(decay_steps=1000), tree)
    step = make_step(
        lambda params, batch, key: lm_loss(params, model.spec, batch, runtime, key), optimizer, tree, runtime
    )
    tokens = jnp.asarray(ids(model, 4, 257))
    ones = jnp.ones((4, 256), jnp.int32)
    where = jnp.broadcast_to(jnp.arange(256)[None], (4, 256))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(jnp.float32), ones, where, jnp.zeros_like(ones))
    state = [init_state(tree, optimizer, jax.random.key(0))]

    def run() -> Any:
        state[0], metrics = step(state[0], batch)
        return metrics["loss"]

    return {"train 4x256": (1024, run)}


if __name__ == "__main__":
    main()
