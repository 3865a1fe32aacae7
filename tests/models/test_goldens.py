"""Every family against tiny checkpoints and what the reference implementation makes of them.

A decoder's cases are padded on the right to one length and run through one program: padding must not show anyway.
Greedy decoding is proven by induction: if each golden token is the argmax after the golden tokens before it, all are.
"""

import numpy as np
import pytest

import jaxllm
from jaxllm.config import DynamicNTK, Transformer
from jaxllm.convert.hf import save_folder
from jaxllm.convert.safetensors_io import open_folder
from jaxllm.models.families import FAMILIES, spec_of_config
from jaxllm.nn.position import by_length
from tests.models.support import GOLDENS, close, config_of, load


def is_known(folder):
    return (folder / "config.json").exists() and config_of(folder)["model_type"] in FAMILIES


def is_decoder(folder):
    spec = spec_of_config(config_of(folder))
    return isinstance(spec, Transformer) and spec.causal


FOLDERS = sorted(folder for folder in GOLDENS.iterdir() if is_known(folder))
every_family = pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
DECODERS = [f for f in FOLDERS if is_decoder(f)]
every_decoder = pytest.mark.parametrize("folder", DECODERS, ids=lambda f: f.name)


def run(folder, ids, mask, length=37):
    model, _ = load(folder)
    wide = [np.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in (ids, mask)]
    return np.asarray(jaxllm.logits(model.spec, model.params, *wide))[:, : ids.shape[1]]


@every_decoder
def test_logits(folder):
    golden = load(folder)[1]
    close(run(folder, golden["input_ids"], golden["attention_mask"]), golden["logits"])


@every_decoder
def test_logits_with_padding_left_and_right(folder):
    golden = load(folder)[1]
    mask = golden["padded.attention_mask"]
    close(run(folder, golden["padded.input_ids"], mask)[mask == 1], golden["padded.logits"][mask == 1])


def keeps_frequencies(folder):
    """Whether a whole text gives what each of its beginnings did; with dynamic NTK see test_families_c.py."""
    stacks = spec_of_config(config_of(folder)).stacks
    return not any(isinstance(scaling, DynamicNTK) for scaling in by_length(stacks))


@pytest.mark.parametrize("folder", [f for f in DECODERS if keeps_frequencies(f)], ids=lambda f: f.name)
@pytest.mark.parametrize("case", ["gen", "gen_leftpad"])
def test_greedy(folder, case):
    golden = load(folder)[1]
    own = f"{case}." if f"{case}.input_ids" in golden.files else ""
    prompt, mask, wanted = golden[f"{own}input_ids"], golden[f"{own}attention_mask"], golden[f"{case}.greedy"]
    ids, mask = np.concatenate([prompt, wanted], 1), np.pad(mask, ((0, 0), (0, wanted.shape[1])), constant_values=1)
    best = run(folder, ids, mask).argmax(-1)
    np.testing.assert_array_equal(best[:, prompt.shape[1] - 1 : -1], wanted)


@every_family
def test_both_config_styles_give_the_same_spec(folder):
    assert spec_of_config(config_of(folder)) == spec_of_config(config_of(folder, "config_v4.json"))


@every_family
@pytest.mark.parametrize("style", ["classic", "modern"])
def test_export_gives_the_same_bits_and_the_same_spec(folder, tmp_path, style):
    model = load(folder)[0]
    save_folder(tmp_path / "out", model.spec, model.params, style=style)
    before, after = open_folder(folder), open_folder(tmp_path / "out")
    assert after.shapes == before.shapes
    assert all(after.read(name).tobytes() == before.read(name).tobytes() for name in before.shapes)
    config = config_of(tmp_path / "out")
    assert config["model_type"] == config_of(folder)["model_type"]
    assert spec_of_config(config) == model.spec
