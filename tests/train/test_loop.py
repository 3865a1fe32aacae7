"""The loop as a user meets it: records, resume, signals, bad steps, bad input."""

import json
import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny import experiment

from jaxllm.experiment import Checkpointing, Optimizer, Source, saved
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout
from jaxllm.train import loop
from jaxllm.train.checkpoint import steps
from jaxllm.train.loop import Options, train
from jaxllm.train.metrics import read_metrics

QUIET = Console(quiet=True)


def curve(run_dir, key="train/loss"):
    return {r["step"]: r[key] for r in read_metrics(run_dir) if key in r}


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_run_leaves_everything_behind(tmp_path):
    exp = experiment(tmp_path)
    state = train(exp, QUIET, Options(layer_norms=True))
    run = tmp_path / "run"
    assert int(state.step) == 12
    assert saved((run / "config.json").read_text()) == exp
    assert steps(run / "checkpoints")[-1] == 12
    assert (run / "losses.png").stat().st_size > 10_000
    assert list((run / "tensorboard").iterdir())
    records = read_metrics(run)
    last = records[-2] | records[-1]
    for key in (
        "train/loss", "train/loss/even", "train/loss/odd", "val/loss", "val/bits_per_byte", "tokens_per_second", "mfu",
        "grad_norm", "learning_rate", "skipped_steps", "epochs/train0", "grad_norm/stacks/0/0/attn/q/kernel",
    ):  # fmt: skip
        assert np.isfinite(last[key]), key
    losses = curve(run)
    assert sorted(losses) == [1, 2, 4, 6, 8, 10, 12]
    assert losses[12] < losses[1] - 0.5, "a dozen steps must learn something"
    assert 0 < records[-1]["val/bits_per_byte"] < 8


@pytest.mark.parametrize("layout", [None, Layout(zero=1, offload=True, replicate_below=0)])
def test_resume_is_bitwise(tmp_path, layout):
    for name in "ab":
        (tmp_path / name).mkdir()
    runtime = Runtime(layout=layout)
    whole = train(experiment(tmp_path / "a", runtime=runtime), QUIET)
    slow = Optimizer(peak_lr=1e-2, warmup_steps=2, decay_steps=12)
    exp = experiment(tmp_path / "b", runtime=runtime, optimizer=slow)
    train(replace(exp, steps=8), QUIET)
    resumed = train(exp, QUIET)
    assert equal(whole.params, resumed.params)
    assert equal(whole.opt_state, resumed.opt_state)
    a, b = curve(tmp_path / "a" / "run"), curve(tmp_path / "b" / "run")
    assert a == b


def test_sigterm_saves_and_stops(tmp_path, monkeypatch):
    original = loop.record

    def record(exp, setup, i, m, speed):
        if i == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(exp, setup, i, m, speed)

    monkeypatch.setattr(loop, "record", record)
    state = train(experiment(tmp_path, checkpoint=Checkpointing(every=None)), QUIET)
    assert int(state.step) == 6
    assert steps(tmp_path / "run" / "checkpoints") == [6]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(tmp_path, monkeypatch):
    from jaxllm.train import step as steps_module

    exp = experiment(tmp_path, max_bad_steps=3)
    original = steps_module.gradients

    def poisoned(*args):
        value, aux, grads = original(*args)
        batch = args[3]
        bad = jnp.where(jnp.sum(batch.tokens_BT) % 1 == 0, jnp.nan, 0.0)  # always, but not to the compiler
        return value + bad, aux, jax.tree.map(lambda g: g + bad, grads)

    monkeypatch.setattr(steps_module, "gradients", poisoned)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*the fault does not repeat.*peak_lr"):
        train(exp, QUIET)
    assert not steps(tmp_path / "run" / "checkpoints"), "no checkpoint of weights that never moved"


def test_a_bad_step_changes_only_counters(tmp_path):
    from jaxllm.train.optimizer import make_optimizer
    from jaxllm.train.step import init_state, make_step
    from jaxllm.transformer import transformer_params

    exp = experiment(tmp_path)
    tree = transformer_params(exp.model)
    optimizer = make_optimizer(exp.optimizer, tree)

    def loss(params, batch, key):
        value = jnp.sum(params["norm"]["scale"]) * batch["scale"]
        return value, {"weight": jnp.float32(1)}

    step = make_step(loss, optimizer, tree, Runtime())
    state = init_state(tree, optimizer, jax.random.key(0))
    state, _ = step(state, {"scale": jnp.float32(1.0)})
    kept = jax.device_get((state.params, state.opt_state))
    state, m = step(state, {"scale": jnp.float32(np.inf)})
    assert equal((state.params, state.opt_state), kept)
    assert (int(state.step), int(m["skipped"]), int(m["bad_streak"])) == (2, 1, 1)
    state, m = step(state, {"scale": jnp.float32(1.0)})
    assert (int(m["skipped"]), int(m["bad_streak"])) == (1, 0)
    assert not equal(state.params, kept[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"runtime": Runtime(layout=Layout(tensor=3))}, "number of devices, 8"),
        (
            {"runtime": Runtime(layout=Layout()), "batch_size": 12},
            "batch_size=12 must be a multiple of .*; the next that is: 16",
        ),
        ({"seed": 1}, "seed was 0"),
    ],
)
def test_bad_input_before_the_first_step(tmp_path, changes, message):
    exp = experiment(tmp_path)
    if "seed" in changes:
        loop.claim_run_dir(exp)
    if isinstance(changes.get("data"), str):
        changes = {"data": replace(exp.data, sources=(Source(changes["data"]),))}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(replace(exp, **changes), QUIET)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_directory_of_something_else_is_not_touched(tmp_path):
    exp = experiment(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not empty and has no config"):
        train(exp, QUIET)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_tokenizer_that_does_not_match_the_checkpoint(tmp_path):
    from jaxllm.data.train_tokenizer import train_tokenizer

    exp = experiment(tmp_path)
    train(replace(exp, steps=4), QUIET)
    train_tokenizer(["completely different words entirely " * 30], 290).save(tmp_path / "run" / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer"):
        train(replace(exp, steps=8), QUIET)


def test_metrics_drop_what_lies_past_the_checkpoint(tmp_path):
    from etils import epath

    from jaxllm.train.metrics import MetricsWriter

    run = epath.Path(tmp_path)
    lines = [{"step": i, "train/loss": 1.0} for i in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + '{"step": 8, "tra')
    with MetricsWriter(run, 4) as writer:
        writer.write(6, {"train/loss": 2.0})
    assert [(r["step"], r["train/loss"]) for r in read_metrics(run)] == [(2, 1.0), (4, 1.0), (6, 2.0)]
