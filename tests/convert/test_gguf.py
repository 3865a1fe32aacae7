"""GGUF: dequantisation against the gguf package, small files written by it, and every kind of damage."""

import struct
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.numpy import load_file

from jaxllm.config import Linear, Llama3, Rope
from jaxllm.convert.gguf import load_gguf, open_gguf, spec_from_gguf
from jaxllm.convert.gguf_blocks import FORMATS, dequantise, nbytes
from jaxllm.convert.hf import load_folder
from jaxllm.model import logits
from jaxllm.nn.position import frequencies

GOLDENS = Path(__file__).parents[1] / "goldens"
HEADS, KV_HEADS, WIDTH = 4, 2, 16
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


# ------------------------------------------------------------------------------------------------------ dequantising


@pytest.mark.parametrize("number", FORMATS)
def test_formats_have_the_reference_sizes(number):
    kind = FORMATS[number]
    assert GGMLQuantizationType(number).name == kind.name
    assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType(number)] == (kind.weights, kind.size)


@pytest.mark.parametrize("number", [n for n, kind in FORMATS.items() if kind.weights > 1])
def test_any_bytes_dequantise_to_the_same_bits(number):
    kind = FORMATS[number]
    raw = np.random.default_rng(number).integers(0, 256, (9, 5 * kind.size), np.uint8)
    with np.errstate(all="ignore"):  # random bytes hold infinite scales too
        want = quants.dequantize(raw, GGMLQuantizationType(number))
        got = dequantise(kind, raw.reshape(-1), want.shape)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.float32


@pytest.mark.parametrize("number", [0, 1, 30])
def test_plain_types(number):
    kind, x = FORMATS[number], np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    raw = quants.quantize(x, GGMLQuantizationType(number)).view(np.uint8).reshape(-1)
    assert nbytes(kind, x.shape) == raw.size
    want = quants.dequantize(quants.quantize(x, GGMLQuantizationType(number)), GGMLQuantizationType(number))
    np.testing.assert_array_equal(dequantise(kind, raw, x.shape), want.reshape(x.shape))


def test_rows_must_be_whole_blocks():
    with pytest.raises(ValueError, match=r"no whole blocks of 32 \(Q4_1\)"):
        nbytes(FORMATS[3], (4, 48))


# -------------------------------------------------------------------------------------------------------- whole files


def interleave(w, heads):
    """Rows of each head from halves to pairs, as llama GGUFs have them."""
    return w.reshape(heads, 2, WIDTH // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def tensors_of(name):
    """A golden llama's tensors under GGUF names."""
    out = {}
    for key, w in load_file(GOLDENS / name / "model.safetensors").items():
        stem = key.removesuffix(".weight")
        if stem in TOP:
            out[TOP[stem] + ".weight"] = w
            continue
        _, _, layer, part = stem.split(".", 3)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(PARTS[part])
        out[f"blk.{layer}.{PARTS[part]}.weight"] = w if heads is None else interleave(w, heads)
    return out


def write(path, tensors, types=None, architecture="llama", **keys):
    """A GGUF of the llama_gqa golden's shape; types: tensor name -> quantisation."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(112)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    chars = [chr(0x100 + i) for i in range(256)]
    letters = {i: chr(i) for i in range(33, 127)}
    vocab = [letters.get(i, chars[i]) for i in range(255)] + ["ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    for key, value in keys.items():
        getattr(writer, key)(value)
    for name, w in tensors.items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, w)
        else:
            writer.add_tensor(name, quants.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "plain.gguf", tensors_of("llama_gqa"))


def test_a_float32_file_is_the_hf_folder_bit_for_bit(plain):
    spec, params, tokenizer = load_gguf(plain)
    wanted_spec, wanted, _ = load_folder(GOLDENS / "llama_gqa")
    assert spec == wanted_spec
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    assert tokenizer.encode("ab") == [255]
    assert tokenizer.eos == 2
    golden = np.load(GOLDENS / "llama_gqa" / "golden.npz")
    np.testing.assert_allclose(logits(spec, params, golden["input_ids"]), golden["logits"], rtol=0, atol=1e-4)


def test_mixed_types_in_one_file(tmp_path):
    kinds = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
    tensors = tensors_of("llama_gqa")
    names = ["token_embd.weight", *(f"blk.{i}.{p}.weight" for i in range(3) for p in ("attn_q", "ffn_gate"))]
    types = {name: GGMLQuantizationType[kind] for name, kind in zip(names, kinds, strict=True)}
    spec, params, _ = load_gguf(write(tmp_path / "mixed.gguf", tensors, types))
    file = open_gguf(tmp_path / "mixed.gguf")
    for name, kind in types.items():
        want = quants.dequantize(quants.quantize(tensors[name], kind), kind)
        np.testing.assert_array_equal(file.read(name), want)
    gate = params["stacks"]["0"]["0"]["ffn"]["gate"]["kernel"]
    np.testing.assert_array_equal(gate[1], file.read("blk.1.ffn_gate.weight").T)
    assert spec.vocab == 256


def test_tied_heads_and_biases_are_told_by_their_tensors(tmp_path):
    tensors = tensors_of("llama_gqa")
    del tensors["output.weight"]
    rng = np.random.default_rng(0)
    for i in range(3):
        for part, n in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32)):
            tensors[f"blk.{i}.{part}.bias"] = rng.standard_normal(n, np.float32)
    spec, params, _ = load_gguf(write(tmp_path / "m.gguf", tensors))
    attn = params["stacks"]["0"]["0"]["attn"]
    assert spec.tied
    assert "bias" not in attn["o"]
    np.testing.assert_array_equal(
        interleave(np.asarray(attn["k"]["bias"][2]).reshape(-1), KV_HEADS), tensors["blk.2.attn_k.bias"]
    )


def divisors(scaling, theta=10_000.0):
    ratio = frequencies(Rope(theta), WIDTH) / frequencies(Rope(theta, scaling=scaling), WIDTH)
    return {"rope_freqs.weight": ratio.astype(np.float32)}


def test_rope_settings(tmp_path):
    tensors = tensors_of("llama_gqa")
    path = write(
        tmp_path / "linear.gguf",
        tensors,
        add_rope_scaling_type=gguf.RopeScalingType.LINEAR,
        add_rope_scaling_factor=4.0,
    )
    assert spec_from_gguf(open_gguf(path)).stacks[0].pattern[0].attn.position == Rope(scaling=Linear(4.0))
    path = write(tmp_path / "llama3.gguf", tensors | divisors(Llama3(8.0)), add_rope_freq_base=10_000.0)
    assert load_gguf(path)[0].stacks[0].pattern[0].attn.position == Rope(scaling=Llama3(8.0))
    path = write(tmp_path / "other.gguf", tensors | divisors(Llama3(8.0, original=32)))
    with pytest.raises(ValueError, match=r"rope_freqs.weight must be Llama 3.1's"):
        load_gguf(path)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_bad_magic_version_and_absence(tmp_path, plain):
    content = plain.read_bytes()
    for bad, message in (
        (b"", "the file is empty"),
        (b"GGML" + content[4:], "begins with b'GGUF', this one with b'GGML'"),
        (content[:4] + struct.pack("<I", 1) + content[8:], "version must be 2 or 3.*found 1"),
        (content[:4] + struct.pack(">I", 3) + content[8:], "little endian"),
    ):
        (tmp_path / "bad.gguf").write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            open_gguf(tmp_path / "bad.gguf")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_gguf(tmp_path / "absent.gguf")


def test_truncation_anywhere_is_found_at_once(tmp_path, plain):
    content = plain.read_bytes()
    for cut in (6, 20, 100, 3000, len(content) // 2, len(content) - 40):
        (tmp_path / "cut.gguf").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"cut short.*copy the file again|version must be"):
            open_gguf(tmp_path / "cut.gguf")


def test_unsupported_type_is_named_with_its_tensor(tmp_path, plain):
    content = bytearray(plain.read_bytes())
    name = b"blk.1.attn_v.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", 23)
    (tmp_path / "iq.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"blk.1.attn_v.weight has type IQ4_XS, not supported; readable are BF16"):
        open_gguf(tmp_path / "iq.gguf")


def test_missing_and_extra_tensors_are_named(tmp_path):
    tensors = tensors_of("llama_gqa")
    tensors["blk.0.attn_q_norm.weight"] = np.ones(16, np.float32)
    del tensors["blk.2.ffn_up.weight"]
    with pytest.raises(ValueError, match="do not match") as error:
        load_gguf(write(tmp_path / "m.gguf", tensors))
    assert "missing: blk.2.ffn_up.weight [112, 64]" in str(error.value)
    assert "extra: blk.0.attn_q_norm.weight [16]" in str(error.value)


def test_other_architectures_and_keys_are_refused_by_name(tmp_path):
    tensors = tensors_of("llama_gqa")
    with pytest.raises(ValueError, match=r"general.architecture must be 'llama', found 'mamba'"):
        load_gguf(write(tmp_path / "a.gguf", tensors, architecture="mamba"))
    with pytest.raises(ValueError, match=r"expert_count.*might change the math"):
        load_gguf(write(tmp_path / "b.gguf", tensors, add_expert_count=4))
    with pytest.raises(ValueError, match=r"rope.scaling.type must be 'none' or 'linear', found 'yarn'"):
        load_gguf(write(tmp_path / "c.gguf", tensors, add_rope_scaling_type=gguf.RopeScalingType.YARN))
    with pytest.raises(ValueError, match="partial"):
        load_gguf(write(tmp_path / "d.gguf", tensors, add_rope_dimension_count=8))
