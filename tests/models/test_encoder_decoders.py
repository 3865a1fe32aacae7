"""T5, mT5, BART: the reference's numbers, greedy decoding through the caches, contracts of encoder-decoders."""

import shutil
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm import encoder_decoder as ed
from jaxllm.architectures import model_params
from jaxllm.config import GLU, MLP, EncoderDecoder
from jaxllm.decode.weights import prepare
from jaxllm.mesh import make_mesh
from jaxllm.models.families import FAMILIES, family_of_spec, settled, spec_of_config
from jaxllm.models.presets import ENCODER_DECODERS, toy_encoder_decoder
from jaxllm.params import unstack
from jaxllm.records import Inputs, inputs
from jaxllm.rules import wanted
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout
from tests.models.support import GOLDENS, close, config_of, load, noisy

FOLDERS = ["t5_v1_1", "bart"]
every_folder = pytest.mark.parametrize("folder", FOLDERS)


# ---------------------------------------------------------------------------------------------------------- goldens


@every_folder
def test_reference(folder):
    model, golden = load(folder)
    args, target = (model.spec, model.params), golden["decoder_input_ids"]
    for case in ("", "padded."):
        ids, mask = golden[f"{case}input_ids"], golden[f"{case}attention_mask"]
        close(jaxllm.logits(*args, ids, mask, decoder_input_ids=target), golden[f"{case}logits"])
    ids, mask = golden["input_ids"], golden["attention_mask"]
    close(jaxllm.hidden_states(*args, ids, mask)[-1], golden["encoder_last_hidden_state"])
    states = jaxllm.hidden_states(*args, ids, mask, decoder_input_ids=target)
    for got, want in zip(states, golden["decoder_hidden_states"], strict=True):
        close(got, want)


@every_folder
def test_greedy_decoding_through_the_caches(folder):
    """Prompts of different lengths in one batch; with plain weights, and with those laid out for decoding."""
    model, golden = load(folder)
    prompts, wanted_ids = [], []
    for case, prefix in (("gen", ""), ("gen_padded", "padded.")):
        for row, real, ids in zip(
            golden[f"{prefix}input_ids"], golden[f"{prefix}attention_mask"], golden[f"{case}.greedy"], strict=True
        ):
            prompts.append(row[real == 1].tolist())
            wanted_ids.append(ids[1:].tolist())
    for params in (model.params, prepare(model.params, model.spec, Runtime())):
        assert jaxllm.generate(model.spec, params, prompts, max_new_tokens=16).ids() == wanted_ids
    assert golden["gen.greedy"][0, 0] == model.spec.start


def test_bad_inputs():
    model, golden = load("t5_v1_1")
    args, ids = (model.spec, model.params), golden["input_ids"]
    with pytest.raises(ValueError, match="give decoder_input_ids, from id 0 on"):
        jaxllm.logits(*args, ids)
    with pytest.raises(ValueError, match=r"decoder_input_ids must be in 0\.\.255, found 0\.\.999"):
        jaxllm.logits(*args, ids, decoder_input_ids=[[0, 999]] * 2)
    with pytest.raises(ValueError, match=r"token_type_ids: .*leave it out"):
        jaxllm.logits(*args, ids, decoder_input_ids=ids, token_type_ids=ids)
    with pytest.raises(ValueError, match=r"prompt 1 needs ids in 0\.\.255"):
        jaxllm.generate(*args, [[3], []])
    bart = load("bart")[0]
    with pytest.raises(ValueError, match="prompt 0 has 65 tokens, the encoder 64 positions"):
        jaxllm.generate(bart.spec, bart.params, [[3] * 65], max_new_tokens=4)


# --------------------------------------------------------------------------------------------------- every field read


def test_whether_a_head_is_tied_is_told_by_the_tensors(tmp_path):
    """transformers 5 writes tie_word_embeddings=true whatever is in the file; scaling is a setting of its own."""
    new, old = config_of("t5_v1_1"), config_of("t5_v1_1", "config_v4.json")
    assert spec_of_config(new) == spec_of_config(old)
    family, dim = FAMILIES["t5"], 64
    for scaled in (True, False):
        for own in (True, False):
            spec = settled(
                family, spec_of_config(new | {"scale_decoder_outputs": scaled}), {"lm_head.weight"} if own else {"x"}
            )
            assert (spec.head.tied, spec.head.scale) == (not own, dim**-0.5 if scaled else 1.0)
            assert family_of_spec(spec)[1]["scale_decoder_outputs"] == scaled
    shutil.copytree(GOLDENS / "t5_v1_1", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(
        tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].copy()}, tmp_path / "m/model.safetensors"
    )
    assert jaxllm.load(tmp_path / "m").spec.tied
    assert jaxllm.spec_of(tmp_path / "m").tied


def bart_without_bias():
    return settled(FAMILIES["bart"], spec_of_config(config_of("bart")), {"shared.weight"})


def test_bart_without_the_bias_of_its_logits():
    spec = bart_without_bias()
    assert not spec.head.bias
    names = wanted(FAMILIES["bart"].names(spec), model_params(spec))
    assert "final_logits_bias" not in names
    assert family_of_spec(spec)[1]["architectures"] == ["BartForConditionalGeneration"]


def low(spec):
    return spec.encoder.stacks[0].pattern[0]


CHANGES = [
    ("t5_v1_1", {"num_decoder_layers": None}, lambda s: s.decoder.layers, 3),
    (
        "t5_v1_1",
        {"feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False},
        lambda s: low(s).ffn,
        MLP(96, "relu"),
    ),
    ("t5_v1_1", {"feed_forward_proj": "gated-silu", "dense_act_fn": "silu"}, lambda s: low(s).ffn, GLU(96, "silu")),
    ("t5_v1_1", {"relative_attention_num_buckets": 16}, lambda s: low(s).attn.position.buckets, 16),
    ("t5_v1_1", {"layer_norm_epsilon": 1e-3}, lambda s: s.decoder.norm.eps, 1e-3),
    ("t5_v1_1", {"decoder_start_token_id": 7}, lambda s: s.start, 7),
    ("t5_v1_1", {"architectures": ["T5Model"]}, lambda s: s.head, None),
    ("bart", {"scale_embedding": False}, lambda s: (s.encoder.embed.scale, s.decoder.embed.scale), (None, None)),
    ("bart", {"activation_function": "relu"}, lambda s: low(s).ffn.act, "relu"),
    ("bart", {"decoder_attention_heads": 2}, lambda s: s.decoder.stacks[0].pattern[0].cross.attn.heads, 2),
    ("bart", {"encoder_layers": 3}, lambda s: s.encoder.layers, 3),
    ("bart", {"architectures": ["BartModel"]}, lambda s: s.head, None),
    ("bart", {"tie_word_embeddings": False}, lambda s: s.tied, False),
]


@pytest.mark.parametrize(
    ("folder", "change", "look", "value"), CHANGES, ids=lambda x: "" if callable(x) else str(x)[:32]
)
def test_a_field_changes_the_spec_and_comes_back(folder, change, look, value):
    spec = spec_of_config(config_of(folder) | change)
    assert look(spec) == value
    family, config = family_of_spec(spec)
    assert settled(family, spec_of_config(config), wanted(family.names(spec), model_params(spec))) == spec


REFUSED = [
    ("t5_v1_1", {"feed_forward_proj": "gated-gelu-twice"}, "feed_forward_proj"),
    ("t5_v1_1", {"is_decoder": True}, "is_decoder"),
    ("t5_v1_1", {"surprise": 1}, "'surprise'"),
    ("t5_v1_1", {"decoder_start_token_id": -1}, "decoder_start_token_id"),
    ("t5_v1_1", {"architectures": ["T5ForTokenClassification"]}, "T5ForTokenClassification"),
    ("bart", {"normalize_before": True}, "normalize_before"),
    ("bart", {"static_position_embeddings": True}, "static_position_embeddings"),
    ("bart", {"architectures": ["BartForSequenceClassification"]}, "BartForSequenceClassification"),
]


@pytest.mark.parametrize(("folder", "change", "message"), REFUSED, ids=lambda x: str(x)[:50])
def test_unsupported_config_is_refused_by_name(folder, change, message):
    with pytest.raises(ValueError, match=message):
        spec_of_config(config_of(folder) | change)


def test_specs_that_do_not_fit_together():
    spec = load("bart")[0].spec
    with pytest.raises(ValueError, match="both halves read one embedding"):
        replace(spec, encoder=replace(spec.encoder, vocab=7))
    with pytest.raises(ValueError, match="encoder without head that is not causal"):
        replace(spec, encoder=replace(spec.encoder, causal=True))
    with pytest.raises(ValueError, match="every block of the decoder needs cross"):
        EncoderDecoder(spec.encoder, replace(spec.encoder, causal=True, head=spec.head), 0)
    with pytest.raises(ValueError, match="no known family"):
        family_of_spec(EncoderDecoder(spec.encoder, replace(spec.decoder, norm=low(spec).norm), 2))


# -------------------------------------------------------------------------------------------------------- contracts

TOYS = {name: toy_encoder_decoder(ENCODER_DECODERS[name]()) for name in ("t5_small", "bart_base")}
every_toy = pytest.mark.parametrize("name", TOYS)


@cache
def params_of(name):
    return noisy(model_params(TOYS[name]))


def ids(seed, *shape):
    return jax.random.randint(jax.random.key(seed), shape, 4, 97)


def run(name, source, target, runtime=Runtime(), params=None):
    params = params_of(name) if params is None else params
    return jax.jit(lambda p, s, t: ed.forward(p, TOYS[name], s, t, runtime).hidden_BTD)(params, source, target)


def test_the_embedding_is_owned_once():
    tree = model_params(TOYS["bart_base"])
    assert "tokens" not in tree["encoder"]["embed"]
    assert "tokens" not in tree["decoder"]["embed"]
    whole = ed.half(params_of("bart_base"), "decoder")
    assert whole["embed"]["tokens"] is params_of("bart_base")["tokens"]


@every_toy
def test_the_decoder_is_causal_and_reads_the_source(name):
    spec, params = TOYS[name], params_of(name)

    @jax.jit
    def sensitivity(source, target):
        def value(source, target):
            given = [Inputs(None, jnp.arange(12)[None], embeds_BTD=x) for x in (source, target)]
            return jnp.sum(jnp.square(ed.forward(params, spec, *given, Runtime()).hidden_BTD[:, 5] - 1.0))

        return jax.grad(value, (0, 1))(source, target)

    x = jax.random.normal(jax.random.key(1), (2, 1, 12, spec.dim))
    of_source, of_target = (np.abs(g[0]).sum(-1) for g in sensitivity(x[0], x[1]))
    assert (of_source > 0).all()
    assert (of_target[6:] == 0).all()
    assert (of_target[:6] > 0).all()


@every_toy
def test_padding_and_batch_mates_are_invisible(name):
    source, target = ids(2, 2, 18), ids(3, 2, 9)
    alone = run(name, inputs(source[:1, :13]), inputs(target[:1]))[0]
    mask = jnp.ones((2, 18), jnp.int32).at[0, 13:].set(0)
    got = run(name, inputs(source.at[0, 13:].set(3), mask), inputs(target.at[1].set(5)))
    close(got[0], alone, 2e-5)
    if TOYS[name].encoder.embed.position is None:  # without positions padding on the left does not show either
        shifted = jnp.roll(source, 5, 1).at[0, :5].set(3)
        close(run(name, inputs(shifted, jnp.roll(mask, 5, 1)), inputs(target))[0], alone, 2e-5)


@every_toy
def test_how_never_changes_what(name):
    """A memory made before, unrolled, lists of layers, another backend, a mesh of data and tensor axes."""
    spec, params = TOYS[name], params_of(name)
    source, target = inputs(ids(4, 2, 18)), inputs(ids(5, 2, 20))
    want = run(name, source, target)
    memory = ed.memory_rows(params, spec, ed.encode(params, spec, source, Runtime()), Runtime())
    close(run(name, source, replace(target, memory=memory)), want, 2e-5)
    close(run(name, source, target, Runtime(unroll=True, attention="reference")), want, 2e-5)
    listed = params | {half: unstack(params[half]) for half in ("encoder", "decoder")}
    close(run(name, source, target, params=listed), want, 2e-5)
    layout = Layout(data=2, tensor=2)
    with jax.set_mesh(make_mesh(layout, jax.devices()[:4])):
        close(run(name, source, target, Runtime(layout=layout)), want, 2e-5)


def test_packed_memory_keeps_documents_apart():
    """Two documents per row on both sides: queries meet only the memory of their own segment."""
    name, spec, params = "t5_small", TOYS["t5_small"], params_of("t5_small")
    source, target = ids(6, 1, 16), ids(7, 1, 12)
    halves = [(slice(0, 9), slice(0, 5)), (slice(9, 16), slice(5, 12))]
    s_segment, t_segment = jnp.where(jnp.arange(16) < 9, 1, 2)[None], jnp.where(jnp.arange(12) < 5, 1, 2)[None]
    packed = replace(inputs(source), segment_BT=s_segment)
    memory = replace(ed.encode(params, spec, packed, Runtime()), packed=True)
    got = run(name, packed, replace(inputs(target), segment_BT=t_segment, memory=memory))
    for s, t in halves:
        close(got[0, t], run(name, inputs(source[:, s]), inputs(target[:, t]))[0], 2e-5)
