"""An experiment: everything that a training run is made of, as one frozen value.

A config file is a Python file with `def config() -> Experiment`. Derived values stay None until overrides are applied;
`resolve` fills them in and checks what can be checked before any work. The resolved value is saved in the run
directory as tagged JSON. On resume these may change: steps, run_dir, log_every, eval_every, checkpoint, runtime
(layout included); anything else is refused, since it would be another run under the same name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from etils import epath

from jaxllm import config, runtime, serial, sharding
from jaxllm.config import Transformer
from jaxllm.runtime import Runtime

MAY_CHANGE = ("steps", "run_dir", "log_every", "eval_every", "checkpoint", "runtime", "max_bad_steps")


@dataclass(frozen=True)
class Source:
    """A corpus: a text file, JSONL(.gz), a directory or glob of them, local or gs://.

    weight: its share of the mixture.
    """

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class TokenizerChoice:
    """path: a saved tokenizer (sentencepiece .model, tokenizer.json or a directory). None: train one on the corpus."""

    path: str | None = None
    kind: Literal["bpe", "unigram"] = "bpe"


@dataclass(frozen=True)
class Data:
    """What to train on.

    context: tokens per row.  held_out_chars: the last so many characters of the documents, joined by two newlines in
    file order, are the validation text.  packing: how documents share rows.  cache_dir: where token shards are kept
    (None: in the run directory).
    """

    sources: tuple[Source, ...]
    context: int
    held_out_chars: int = 0
    tokenizer: TokenizerChoice = TokenizerChoice()
    packing: Literal["greedy", "best_fit"] = "greedy"
    cache_dir: str | None = None


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, §3.2).

    The loss is multiplied by a scale that starts at `start`, is halved by a step whose gradients overflow, which is
    skipped, and doubled after `growth_every` good ones in a row. It stays within `floor` and 2**24; an overflow at the
    floor is a bad step like any other that is not finite.
    """

    start: float = 2.0**15
    growth_every: int = 2000
    floor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.floor <= self.start <= 2.0**24:
            raise ValueError(
                f"optimizer.loss_scale: must be 0 < floor <= start <= 2**24, got floor={self.floor}, "
                f"start={self.start}; usual are floor=1, start=32768"
            )
        if self.growth_every < 1:
            raise ValueError(f"optimizer.loss_scale.growth_every={self.growth_every} must be at least 1; 2000 is usual")


@dataclass(frozen=True)
class Optimizer:
    """AdamW with decoupled decay (Loshchilov & Hutter 2019), linear warm-up, cosine to `end_fraction` of peak_lr.

    decay_steps: length of the schedule (None: the run's steps).  Decay applies to matrices, not to norms or biases.
    masters: dtype in which matrices of layers are stored; "bfloat16" rounds every update stochastically.
    moments: "int8" keeps theirs in 8 bits with a scale per block (Dettmers et al. 2022).
    loss_scale: how the loss is scaled when `runtime.compute_dtype` is "float16"; without effect otherwise.
    """

    peak_lr: float = 3e-4
    warmup_steps: int = 100
    decay_steps: int | None = None
    end_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    masters: Literal["float32", "bfloat16"] = "float32"
    moments: Literal["float32", "int8"] = "float32"
    loss_scale: LossScale = LossScale()


@dataclass(frozen=True)
class Balance:
    """What keeps the experts of a mixture in use; nothing for models without.

    load, z: weights of the load-balance and the router's z loss, means over layers, added to the cross-entropy.
    correction: what the corrections of routers that have them (DeepSeek V3) move per step, towards equal loads.
    """

    load: float = 0.01
    z: float = 0.0
    correction: float = 0.001


@dataclass(frozen=True)
class Checkpointing:
    """every: steps between saves (None: only at the end).  keep: latest ones kept, besides the best by bits/byte."""

    every: int | None = 500
    keep: int = 2
    best: bool = True


@dataclass(frozen=True)
class Experiment:
    """One run. batch_size: rows per optimiser step over all devices, in `accumulate` micro-batches.

    max_bad_steps: consecutive non-finite steps (skipped and counted) after which the run stops with a report.
    samples: prompts to continue when training ends.
    """

    model: Transformer
    data: Data
    steps: int
    batch_size: int
    run_dir: str
    optimizer: Optimizer = Optimizer()
    balance: Balance = Balance()
    accumulate: int = 1
    runtime: Runtime = field(default_factory=Runtime)
    seed: int = 0
    log_every: int = 10
    eval_every: int | None = None
    checkpoint: Checkpointing = Checkpointing()
    max_bad_steps: int = 10
    samples: tuple[str, ...] = field(default=("\n",))


KINDS = serial.kinds_of(config, sharding, runtime, sys.modules[__name__])


def resolve(exp: Experiment) -> Experiment:
    """Fill in derived values and check the rest. Raises ValueError with the rule, the value and the cure."""
    positive = {"steps": exp.steps, "batch_size": exp.batch_size, "accumulate": exp.accumulate}
    for name, n in positive.items():
        if n < 1:
            raise ValueError(f"{name}={n} must be at least 1")
    if exp.batch_size % exp.accumulate:
        raise ValueError(
            f"batch_size={exp.batch_size} must be a multiple of accumulate={exp.accumulate}; "
            f"the nearest is {exp.batch_size // exp.accumulate * exp.accumulate or exp.accumulate}"
        )
    if exp.data.context > exp.model.context:
        raise ValueError(
            f"data.context={exp.data.context} must not exceed model.context={exp.model.context}, the longest sequence "
            "the model was made for"
        )
    decay = exp.steps if exp.optimizer.decay_steps is None else exp.optimizer.decay_steps
    warmup = min(exp.optimizer.warmup_steps, max(decay - 1, 0))
    optimizer = dataclasses.replace(exp.optimizer, decay_steps=decay, warmup_steps=warmup)
    every = exp.eval_every if exp.eval_every is not None else exp.checkpoint.every or exp.steps
    return dataclasses.replace(exp, optimizer=optimizer, eval_every=every)


def load_config(path: str, overrides: Iterable[str] = ()) -> Experiment:
    """Run `config()` of a Python file, apply typed overrides, resolve.

    Raises ValueError when the file is missing, has no `config()`, or returns something else.
    """
    if not epath.Path(path).exists():
        raise ValueError(f"config file {path!r} does not exist; see configs/ for examples")
    module_spec = importlib.util.spec_from_file_location("jaxllm_config", path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"config file {path!r} must be a Python file (.py) with `def config() -> Experiment`")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise ValueError(f"config file {path!r} must define `def config() -> Experiment`")
    exp = module.config()
    if not isinstance(exp, Experiment):
        raise ValueError(f"config() of {path!r} must return an Experiment, not {type(exp).__name__}")
    return resolve(serial.override(exp, overrides))


def saved(text: str) -> Experiment:
    """The experiment in a run directory's config.json."""
    return serial.loads(text, KINDS)


def check_resume(old: Experiment, new: Experiment) -> None:
    """Raise ValueError naming the first field that differs and may not (see the module's docstring)."""
    for f in dataclasses.fields(Experiment):
        before, now = getattr(old, f.name), getattr(new, f.name)
        if f.name not in MAY_CHANGE and before != now:
            raise ValueError(
                f"resume: {f.name} was {before!r} when {old.run_dir} began and is {now!r} now; "
                "set it back, or choose another run_dir"
            )
    half = [exp.runtime.compute_dtype == "float16" for exp in (old, new)]
    if half[0] != half[1]:
        raise ValueError(
            f"resume: compute_dtype was {old.runtime.compute_dtype!r} and is {new.runtime.compute_dtype!r} now; "
            "a run in float16 keeps the scale of its loss, so it cannot change from or to it: choose another run_dir"
        )
