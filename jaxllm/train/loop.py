"""The training loop: set up, resume, loop, save. Straight-line; the step is built in `train.step`."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Key
from rich.console import Console

from jaxllm import serial
from jaxllm.data.files import write_atomic
from jaxllm.data.mixture import epochs_at
from jaxllm.data.tokenizer import check_match
from jaxllm.experiment import Experiment, check_resume, saved
from jaxllm.flops import peak_flops, train_flops_per_token
from jaxllm.mesh import make_mesh
from jaxllm.nn.moe import correct_routers
from jaxllm.nn.pipeline import require_stages
from jaxllm.objectives.lm import lm_loss
from jaxllm.params import count
from jaxllm.records import Batch, Params, TrainState
from jaxllm.sharding import Layout, require_length, row_unit
from jaxllm.train.checkpoint import CHECKPOINTS, Checkpointer, restore
from jaxllm.train.dataset import Dataset, prepare, train_batch
from jaxllm.train.evaluate import Evaluate, evaluate, make_evaluate
from jaxllm.train.metrics import MetricsWriter, by_channel, plot, utilisation
from jaxllm.train.optimizer import make_optimizer, master_params, schedule
from jaxllm.train.processes import decided_by_first
from jaxllm.train.progress import Display
from jaxllm.train.replay import explain
from jaxllm.train.scaling import scaling_of
from jaxllm.train.step import Step, abstract_state, batch_sharding, compiled, init_state, make_step
from jaxllm.transformer import transformer_params


@dataclass(frozen=True)
class Options:
    """What may differ between two starts of one run. profile: write an xprof trace of three early steps.

    layer_norms: log every parameter's gradient norm.
    """

    profile: bool = False
    layer_norms: bool = False


@dataclass(frozen=True)
class Setup:
    """Everything the loop needs, made before the first step. peak: FLOP/s of all devices, and where that is from."""

    mesh: Mesh
    data: Dataset
    step: Step
    evaluate: Evaluate
    sharding: NamedSharding
    state: TrainState
    peak: tuple[float, str]


def train(exp: Experiment, console: Console | None = None, options: Options = Options()) -> TrainState:
    """Train to `exp.steps`, resuming from the newest intact checkpoint of `exp.run_dir`. Returns the final state.

    Raises ValueError for input that cannot work, before any step; FloatingPointError when `max_bad_steps` steps in a
    row were not finite. SIGTERM saves a checkpoint and returns early.
    """
    console = console or Console(quiet=jax.process_index() != 0)
    run_dir = epath.Path(exp.run_dir)
    decided_by_first(partial(claim_run_dir, exp))
    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(Checkpointer(run_dir / CHECKPOINTS, exp.checkpoint.keep, exp.checkpoint.best))
        setup = set_up(exp, console, options)
        state, start = setup.state, int(setup.state.step)
        stack.enter_context(jax.set_mesh(setup.mesh))
        writer = stack.enter_context(MetricsWriter(run_dir, start, active=jax.process_index() == 0))
        display = stack.enter_context(Display(console, start, exp.steps))
        sigterm = stack.enter_context(sigterm_flag())
        stack.enter_context(jax.transfer_guard("disallow"))
        seconds, tokens = 0.0, 0.0
        batch = train_batch(setup.data.train, start, setup.sharding)
        step = compiled(setup.step, state, batch) if start < exp.steps else setup.step
        for i in range(start, exp.steps):
            if options.profile and i == start + 2:
                jax.profiler.start_trace(str(run_dir / "profile"))

            # -------------------------------------------------------------------------------------------- step
            began = time.perf_counter()
            state, metrics = step(state, batch)  # runs while the next batch is read
            batch = train_batch(setup.data.train, i + 1, setup.sharding)
            metrics = jax.device_get(metrics)
            seconds, tokens = seconds + time.perf_counter() - began, tokens + float(metrics["weight"])
            if metrics["bad_streak"] >= exp.max_bad_steps:
                raise FloatingPointError(bad_steps_report(exp, setup, i, metrics, state.params))

            # ----------------------------------------------------------------------------------------- measure
            done, last = i + 1, i + 1 == exp.steps
            if done % exp.log_every == 0 or done == 1 or last:
                values = record(exp, setup, i, metrics, tokens / seconds)
                writer.write(done, values)
                display.update(done, values)
                seconds, tokens = 0.0, 0.0
            score = None
            if setup.data.validation is not None and (done % (exp.eval_every or exp.steps) == 0 or last):
                values = evaluate(setup.evaluate, state.params, setup.data.validation, setup.sharding)
                score = values["val/bits_per_byte"]
                writer.write(done, values)
                display.say(f"step {done:>6}  validation loss {values['val/loss']:.4f}  bits per byte {score:.4f}")

            # -------------------------------------------------------------------------------------------- save
            stop = sigterm[0] if jax.process_count() == 1 else decided_by_first(partial(bool, sigterm[0]))
            if stop or last or (exp.checkpoint.every and done % exp.checkpoint.every == 0):
                saver.save(state, score, {"tokenizer": setup.data.tokenizer.fingerprint})
            if options.profile and (i == start + 4 or last or stop):
                jax.profiler.stop_trace()
            if stop and not last:
                display.say(f"SIGTERM: stopped after step {done} with a checkpoint; the same command continues")
                break
    if jax.process_index() == 0 and (picture := plot(run_dir)) is not None:
        console.print(f"curves: {picture}", highlight=False)
    return state


# ---------------------------------------------------------------------------------------------------------- set-up


def claim_run_dir(exp: Experiment) -> None:
    """Make the run directory and save the resolved config, or check that this is the same run.

    Raises ValueError when the directory holds something else, or another run.
    """
    home = epath.Path(exp.run_dir)
    file = home / "config.json"
    if file.exists():
        check_resume(saved(file.read_text()), exp)
    elif home.exists() and any(not entry.name.startswith(".") for entry in home.iterdir()):
        raise ValueError(
            f"run_dir={exp.run_dir} is not empty and has no config.json, so it is no run of jaxllm; choose another"
        )
    home.mkdir(parents=True, exist_ok=True)
    write_atomic(file, serial.dumps(exp).encode())


def set_up(exp: Experiment, console: Console, options: Options) -> Setup:
    """Mesh, data, jitted functions, and the state: restored, or fresh from `exp.seed`."""

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    runtime = exp.runtime
    mesh = make_mesh(runtime.layout or Layout(data=1), jax.devices() if runtime.layout else jax.devices()[:1])
    check_batch(exp, mesh)
    data = prepare(exp, say)
    tree, scaling = master_params(exp.optimizer, transformer_params(exp.model)), scaling_of(exp)
    optimizer = make_optimizer(exp.optimizer, tree)
    loss = partial(_model_loss, exp, len(data.channels))
    step = make_step(
        loss, optimizer, tree, runtime, accumulate=exp.accumulate, seed=exp.seed, scaling=scaling,
        layer_norms=options.layer_norms, learning_rate=schedule(exp.optimizer), advance=partial(advance, exp),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        like = abstract_state(tree, optimizer, runtime, mesh, scaling)
        found = restore(epath.Path(exp.run_dir) / CHECKPOINTS, like)
        if found is None:
            places = jax.tree.map(lambda x: x.sharding, like)
            fresh = jax.jit(partial(init_state, tree, optimizer, scaling=scaling), out_shardings=places)
            state = fresh(jax.random.key(exp.seed))
        else:
            state, meta = found
            check_match(data.tokenizer, meta["tokenizer"], f"the checkpoint in {exp.run_dir}")
            say(f"continuing from step {int(state.step)} of {exp.run_dir}")
    peak = peak_flops(list(mesh.devices.flat))
    sharding = batch_sharding(runtime, mesh)
    _introduce(exp, data, mesh, peak, say)
    evaluate = make_evaluate(exp.model, replace(runtime, matmul="default"), len(data.channels))
    return Setup(mesh, data, step, evaluate, sharding, state, peak)


def _model_loss(
    exp: Experiment, channels: int, params: Any, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    return lm_loss(params, exp.model, batch, exp.runtime, key, channels=channels, balance=exp.balance)


def advance(exp: Experiment, params: Any, aux: dict[str, Array]) -> Any:
    """The weights that no gradient trains, moved: the corrections of routers, by their experts' load [L, E]."""
    if "expert_load" not in aux:
        return params
    return correct_routers(params, exp.model, aux["expert_load"], exp.balance.correction)


def _introduce(exp: Experiment, data: Dataset, mesh: Mesh, peak: tuple[float, str], say: Any) -> None:
    runtime, sizes = exp.runtime, ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    say(f"model  {exp.model.name}: {count(transformer_params(exp.model)):,} parameters, {exp.model.layers} layers")
    tokens = sum(source.shards.tokens for source in data.train.sources)
    say(f"data   {tokens:,} tokens, vocabulary {data.tokenizer.vocab:,}, channels {', '.join(data.channels)}")
    dtypes = f"{runtime.compute_dtype} compute, {exp.optimizer.masters} masters"
    say(f"mesh   {sizes}; {dtypes}; batch {exp.batch_size} x {exp.data.context}")
    flops = train_flops_per_token(exp.model, exp.data.context)
    say(f"mfu  = {flops / 1e6:,.2f} MFLOP per token x tokens/s / {peak[0] / 1e12:,.3f} TFLOP/s ({peak[1]})")


def check_batch(exp: Experiment, mesh: Mesh) -> None:
    """Raise ValueError when the rows of micro-batches [B, T], or their tokens, do not divide over the devices."""
    layout = exp.runtime.layout
    if layout is None:
        return
    unit = exp.accumulate * row_unit(layout, mesh.shape)
    if exp.batch_size % unit:
        raise ValueError(
            f"batch_size={exp.batch_size} must be a multiple of {unit}: of accumulate times replica x data x expert x "
            f"stage, and times replica x data x expert x microbatches; the next that is: "
            f"{-(-exp.batch_size // unit) * unit}"
        )
    require_stages(exp.model.stacks, layout)
    require_length(exp.data.context, layout, mesh.shape)


# ------------------------------------------------------------------------------------------------------- reporting


def record(exp: Experiment, setup: Setup, i: int, m: dict[str, Any], tokens_per_second: float) -> dict[str, float]:
    """What metrics.jsonl says of the step with index i: its own loss, and the speed since the last record."""
    flops = train_flops_per_token(exp.model, exp.data.context)
    layers = {name: float(value) for name, value in m.items() if name.startswith("grad_norm/")}
    experts = utilisation(m) if "expert_load" in m else {}
    return {
        "train/loss": float(m["loss"]) - experts.get("train/router_loss", 0.0),
        **experts,
        **by_channel(setup.data.channels, m["channel_nll"], m["channel_weight"], "train/loss"),
        "grad_norm": float(m["grad_norm"]),
        "learning_rate": float(m["learning_rate"]),
        "skipped_steps": int(m["skipped"]),
        **{name: float(m[name]) for name in ("loss_scale", "overflows") if name in m},
        "tokens_per_second": tokens_per_second,
        "mfu": flops * tokens_per_second / setup.peak[0],
        **{f"epochs/{name}": n for name, n in epochs_at(setup.data.train, i + 1).items()},
        **layers,
    }


def bad_steps_report(exp: Experiment, setup: Setup, i: int, m: dict[str, Any], params: Params) -> str:
    """Why training stops after `max_bad_steps` steps that were not finite, where it began, and what to try."""
    bad = [name for name, nll in zip(setup.data.channels, m["channel_nll"], strict=True) if not np.isfinite(nll)]
    try:
        fault = explain(exp, params, train_batch(setup.data.train, i, setup.sharding), i)
    except RuntimeError as error:  # out of memory, most likely: the rest of the report must not be lost
        fault = f"its replay failed ({str(error).splitlines()[0][:200]})"
    return (
        f"step {i + 1}: {int(m['bad_streak'])} steps in a row had a loss or gradient that is not finite "
        f"(loss {float(m['loss'])}, gradient norm {float(m['grad_norm'])}, channels with a bad loss: {bad or 'none'}); "
        f"{fault}. {int(m['skipped'])} were skipped in all, the weights are those of the last good step. Try a lower "
        f"optimizer.peak_lr (now {exp.optimizer.peak_lr}), a longer warm-up, or runtime.compute_dtype=float32; "
        f"the newest checkpoint in {exp.run_dir} is intact"
    )


@contextlib.contextmanager
def sigterm_flag() -> Iterator[list[bool]]:
    """[False], which becomes [True] on SIGTERM. Outside the main thread signals are left alone."""
    flag = [False]

    def on_signal(number: int, frame: FrameType | None) -> None:
        flag[0] = True

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, previous)
