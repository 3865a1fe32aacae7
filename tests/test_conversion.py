"""`jaxllm convert`: other families, formats and dtypes give the same logits, or a clear refusal and nothing on disk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.cli import main
from jaxllm.config import Stack
from jaxllm.conversion import convert, size_of
from jaxllm.convert import translate
from jaxllm.convert.safetensors_io import Folder, open_folder
from jaxllm.models.common import with_blocks
from tests.convert import test_gguf as gguf_file

GOLDENS = Path(__file__).parent / "goldens"
IDS = np.random.default_rng(0).integers(3, 96, (2, 30))


def logits(path):
    model = jaxllm.load(path)
    return np.asarray(jaxllm.logits(model.spec, model.params, IDS))


def same_logits(a, b):
    np.testing.assert_allclose(logits(a), logits(b), rtol=0, atol=1e-6)


def same_bits(a, b):
    before, after = open_folder(a), open_folder(b)
    assert after.shapes == before.shapes
    assert all(after.read(name).tobytes() == before.read(name).tobytes() for name in before.shapes)


def changed(tmp_path, name, change, **config):
    """A copy of a golden with tensors and fields changed."""
    shutil.copytree(GOLDENS / name, tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    save_file({k: change(k, v) for k, v in load_file(file).items()}, file)
    fields = json.loads((GOLDENS / name / "config.json").read_text()) | config
    (tmp_path / "changed" / "config.json").write_text(json.dumps(fields))
    return tmp_path / "changed"


# -------------------------------------------------------------------------------------------------- between families


def test_around_the_families_and_back(tmp_path):
    """llama, mistral, qwen2 (zero biases), llama (zero biases on o as well), mistral, llama: the same bits."""
    at = GOLDENS / "llama_gqa"
    for i, family in enumerate(["mistral", "qwen2", "llama", "mistral", "llama"]):
        convert(at, tmp_path / str(i), "hf", family=family)
        at = tmp_path / str(i)
        assert json.loads((at / "config.json").read_text())["model_type"] == family
        same_logits(GOLDENS / "llama_gqa", at)
    biases = {name for name in open_folder(tmp_path / "1").shapes if name.endswith("bias")}
    assert len(biases) == 9 and not any(open_folder(tmp_path / "1").read(name).any() for name in biases)
    same_bits(GOLDENS / "llama_gqa", at)


def test_biases_find_their_place_or_are_refused(tmp_path):
    convert(GOLDENS / "qwen2", tmp_path / "llama", "hf", family="llama")
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["attention_bias"] is True
    same_logits(GOLDENS / "qwen2", tmp_path / "llama")
    with pytest.raises(ValueError, match=r"attn/[qkv]/bias is not zero, and 'mistral' has no place"):
        convert(GOLDENS / "qwen2", tmp_path / "mistral", "hf", family="mistral")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


def test_windows(tmp_path):
    with pytest.raises(ValueError, match=r"--family llama: its config.json expresses neither"):
        convert(GOLDENS / "mistral_swa", tmp_path / "llama", "hf", family="llama")
    wide = changed(tmp_path, "mistral_swa", lambda k, v: v, sliding_window=128)
    convert(wide, tmp_path / "llama", "hf", family="llama")
    same_logits(wide, tmp_path / "llama")
    convert(GOLDENS / "mistral_swa", tmp_path / "qwen2", "hf", family="qwen2")
    same_logits(GOLDENS / "mistral_swa", tmp_path / "qwen2")


@pytest.mark.parametrize(("name", "family"), [("phi3", "mistral"), ("glm", "chatglm"), ("smollm3", "smollm3")])
def test_fused_and_renamed_tensors(tmp_path, name, family):
    convert(GOLDENS / name, tmp_path / "out", "hf", family=family)
    same_logits(GOLDENS / name, tmp_path / "out")
    back = json.loads((GOLDENS / name / "config.json").read_text())["model_type"]
    convert(tmp_path / "out", tmp_path / "back", "hf", family=back)
    same_bits(GOLDENS / name, tmp_path / "back")


def test_rotary_pairs_change_their_order(tmp_path):
    """A llama with interleaved pairs, which its config cannot say, is written with halves."""
    model = jaxllm.load(GOLDENS / "llama_gqa")
    flip = lambda b: replace(b, attn=replace(b.attn, position=replace(b.attn.position, interleaved=True)))
    spec = with_blocks(model.spec, lambda i, b: flip(b))
    wanted = np.asarray(jaxllm.logits(spec, model.params, IDS))
    assert np.abs(wanted - logits(GOLDENS / "llama_gqa")).max() > 0.1
    family, _, found = translate.nearest(spec, "llama")
    translation = translate.Translation(spec, found, translate.pieces_of(model.params))
    tensors = dict(translate.export(family.names(found), translation, np.dtype("float32")))
    shutil.copytree(GOLDENS / "llama_gqa", tmp_path / "out")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(logits(tmp_path / "out"), wanted, rtol=0, atol=1e-5)


def test_layers_of_another_period_keep_their_order(tmp_path):
    """The source's stacks are cut in other places than the target's."""
    model = jaxllm.load(GOLDENS / "llama_gqa")
    block = model.spec.stacks[0].pattern[0]
    cut = replace(model.spec, stacks=(Stack((block,), 1), Stack((block, block), 1)))
    stacked = model.params["stacks"]["0"]["0"]
    piece = lambda at: jax.tree.map(lambda x: x[at : at + 1], stacked)
    tree = model.params | {"stacks": {"0": {"0": piece(0)}, "1": {"0": piece(1), "1": piece(2)}}}
    family, _, found = translate.nearest(cut, "mistral")
    translation = translate.Translation(cut, found, translate.pieces_of(tree))
    got = dict(translate.export(family.names(found), translation, np.dtype("float32")))
    for name, x in load_file(GOLDENS / "llama_gqa" / "model.safetensors").items():
        np.testing.assert_array_equal(got[name], x)


def test_a_family_that_is_not_known_or_too_different(tmp_path):
    with pytest.raises(ValueError, match="--family lama: not known"):
        convert(GOLDENS / "llama_gqa", tmp_path / "out", "hf", family="lama")
    for family in ("gpt2", "gemma", "cohere"):
        with pytest.raises(ValueError, match="expresses neither"):
            convert(GOLDENS / "llama_gqa", tmp_path / "out", "hf", family=family)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- formats and dtypes


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3_text", "cohere", "gpt2"])
def test_native_and_back(tmp_path, name):
    convert(GOLDENS / name, tmp_path / "run", "native")
    same_logits(GOLDENS / name, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    same_bits(GOLDENS / name, tmp_path / "hf")


@pytest.mark.parametrize("name", ["bert", "t5_v1_1", "clip", "qwen2_vl", "deepseek_v3"])
def test_models_of_any_kind_keep_their_bits(tmp_path, name):
    convert(GOLDENS / name, tmp_path / "out", "hf", shard_bytes=200_000)
    same_bits(GOLDENS / name, tmp_path / "out")


def test_gguf_to_a_folder(tmp_path):
    """Its interleaved pairs become halves: the bits of the folder that the file was made of."""
    gguf_file.write(tmp_path / "model.gguf", gguf_file.tensors_of("llama_gqa"))
    convert(tmp_path / "model.gguf", tmp_path / "out", "hf", family="llama")
    same_bits(GOLDENS / "llama_gqa", tmp_path / "out")


def test_every_tensor_is_read_once_and_shards_are_cut(tmp_path, monkeypatch):
    reads, read = [], Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, name: (reads.append(name), read(self, name))[1])
    convert(GOLDENS / "phi3", tmp_path / "out", "hf", shard_bytes=100_000)
    assert sorted(reads) == sorted(open_folder(GOLDENS / "phi3").shapes)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    monkeypatch.undo()
    same_bits(GOLDENS / "phi3", tmp_path / "out")


def test_dtypes(tmp_path):
    convert(GOLDENS / "llama_gqa", tmp_path / "half", "hf", dtype="bfloat16")
    convert(tmp_path / "half", tmp_path / "again", "hf")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    want = {k: v.astype(jnp.bfloat16) for k, v in load_file(GOLDENS / "llama_gqa" / "model.safetensors").items()}
    found = open_folder(tmp_path / "again")
    assert all(found.read(name).tobytes() == x.tobytes() for name, x in want.items())
    big = changed(tmp_path, "llama_gqa", lambda k, v: v * 1e6 if k == "model.norm.weight" else v)
    with pytest.raises(ValueError, match=r"model.norm.weight: its largest number .* is beyond float16"):
        convert(big, tmp_path / "out", "hf", dtype="float16")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.tmp").exists()


def test_tensors_of_several_dtypes_need_a_choice(tmp_path):
    mixed = changed(tmp_path, "llama_gqa", lambda k, v: v.astype(np.float16) if "norm" in k else v)
    with pytest.raises(ValueError, match=r"several dtypes.*--dtype"):
        convert(mixed, tmp_path / "out", "hf")
    convert(mixed, tmp_path / "out", "hf", dtype="float32")
    same_logits(mixed, tmp_path / "out")


def test_special_ids_and_generation_settings_travel(tmp_path):
    source = changed(tmp_path, "llama_gqa", lambda k, v: v)
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    convert(source, tmp_path / "out", "hf")
    assert jaxllm.load(tmp_path / "out").eos == (7, 9)


def test_refusals(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        convert(GOLDENS / "llama_gqa", tmp_path / "used", "hf")
    with pytest.raises(ValueError, match="--family llama is for --to hf"):
        convert(GOLDENS / "llama_gqa", tmp_path / "out", "native", family="llama")
    with pytest.raises(ValueError, match="a run directory holds a Transformer, found EncoderDecoder"):
        convert(GOLDENS / "t5_v1_1", tmp_path / "out", "native")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "absent", tmp_path / "out", "hf")
    twice = changed(tmp_path, "qwen2", lambda k, v: v)
    tensors = load_file(twice / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, twice / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight differs"):
        convert(twice, tmp_path / "out", "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["changed", "used"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("700", 700), ("2K", 2000)])
def test_sizes(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "5TB", "-1GB", "GB"])
def test_wrong_sizes(text):
    with pytest.raises(ValueError, match="--shard-size"):
        size_of(text)


def test_the_verb(tmp_path, capsys):
    source = str(GOLDENS / "llama_gqa")
    options = ["--to", "hf", "--family", "qwen2", "--shard-size", "90KB"]
    assert main(["convert", source, str(tmp_path / "out"), *options]) == 0
    assert "qwen2" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert main(["convert", source, str(tmp_path / "out"), "--to", "hf"]) == 2
    assert "not empty" in capsys.readouterr().err
