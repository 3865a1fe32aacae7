"""Experiments survive JSON, and overrides are typed."""

import dataclasses

import pytest

from jaxllm import experiment, serial
from jaxllm.experiment import Data, Experiment, Source, check_resume, load_config, resolve, saved
from jaxllm.models.presets import PRESETS
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout


def small(**changes):
    base = Experiment(PRESETS["gemma2_2b"](), Data((Source("corpus"),), 128), steps=100, batch_size=8, run_dir="runs/x")
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_keeps_every_type(name):
    exp = resolve(small(model=PRESETS[name]()))
    assert saved(serial.dumps(exp)) == exp


def test_unknown_type_field_and_schema_are_named():
    text = serial.dumps(small())
    for bad, wanted in [
        (text.replace('"Rope"', '"Ropes"'), "did you mean 'Rope'"),
        (text.replace('"theta"', '"thetas"'), "did you mean 'theta'"),
        (text.replace('"schema": 1', '"schema": 99'), "schema 99"),
        (text[:100], "not a jaxllm config"),
    ]:
        with pytest.raises(ValueError, match=wanted):
            saved(bad)


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("optimizer.peak_lr=1e-3", "optimizer.peak_lr", 1e-3),
        ("steps=1_000", "steps", 1000),
        ("steps=2e3", "steps", 2000),
        ("data.sources.0.weight=2", "data.sources.0.weight", 2.0),
        ("optimizer.clip_norm=none", "optimizer.clip_norm", None),
        ("checkpoint.best=false", "checkpoint.best", False),
        ("runtime.remat=full", "runtime.remat", "full"),
        ("runtime.taps=attn,ffn", "runtime.taps", ("attn", "ffn")),
        ("run_dir=gs://bucket/run=1", "run_dir", "gs://bucket/run=1"),
    ],
)
def test_override(assignment, path, value):
    got = serial.override(small(), [assignment])
    for key in path.split("."):
        got = got[int(key)] if key.isdigit() else getattr(got, key)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimiser.peak_lr=1", "did you mean 'optimizer.peak_lr'"),
        ("peak_lr=1", "did you mean 'optimizer.peak_lr'"),
        ("steps=1.5", "must be int"),
        ("steps=ten", "must be int"),
        ("checkpoint.best=maybe", "must be bool"),
        ("runtime.remat=some", "must be one of none, full"),
        ("data.sources.3.path=x", "index below 1"),
        ("model=3", "set field by field"),
        ("steps", "must look like path=value"),
    ],
)
def test_bad_override_says_rule_value_and_cure(assignment, message):
    with pytest.raises(ValueError, match=message):
        serial.override(small(), [assignment])


def test_what_belongs_together_is_changed_together():
    """Fields that are only valid together, in whatever order; a record, then a field of it."""
    for order in (("runtime.offload=stream", "runtime.remat=full"), ("runtime.remat=full", "runtime.offload=stream")):
        assert serial.override(small(), order).runtime == Runtime(remat="full", offload=("stream",))
    staged = small(runtime=Runtime(layout=Layout(stage=4, microbatches=4)))
    more = serial.override(staged, ["runtime.layout.stage=8", "runtime.layout.microbatches=16"])
    assert more.runtime.layout == Layout(stage=8, microbatches=16)
    again = serial.override(staged, ["runtime.layout.stage=2", "runtime.layout=none"])
    assert again.runtime.layout is None


def test_texts_keep_their_brackets_and_spaces():
    assert serial.override(small(), ["samples=[INST] hi [/INST]"]).samples == ("[INST] hi [/INST]",)
    assert serial.override(small(), ["runtime.remat=[query, key]"]).runtime.remat == ("query", "key")


def test_resolve_fills_derived_values_after_overrides():
    exp = resolve(serial.override(small(), ["steps=500"]))
    assert exp.optimizer.decay_steps == 500
    assert resolve(small(steps=10)).optimizer.warmup_steps == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "accumulate": 4}, "multiple of accumulate=4"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"data": Data((Source("x"),), 100_000)}, "must not exceed model.context"),
    ],
)
def test_resolve_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(small(**changes))


def test_resume_refuses_another_run():
    old = resolve(small())
    check_resume(old, dataclasses.replace(old, log_every=99, run_dir="elsewhere"))
    with pytest.raises(ValueError, match="seed was 0"):
        check_resume(old, dataclasses.replace(old, seed=1))


def test_load_config_errors(tmp_path):
    for name, text, message in [
        ("absent.py", None, "does not exist"),
        ("empty.py", "", "must define"),
        ("other.py", "def config(): return 3", "must return an Experiment, not int"),
    ]:
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config(str(tmp_path / name))


@pytest.mark.parametrize("path", ["quickstart", "smollm2_135m", "gpt2_small", "llama3_8b", "llama2_7b"])
def test_shipped_configs_load(path):
    exp = load_config(f"configs/{path}.py", ["steps=7"])
    assert exp.steps == 7
    assert experiment.saved(serial.dumps(exp)) == exp
