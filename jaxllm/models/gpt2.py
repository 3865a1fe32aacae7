"""GPT-2 (Radford et al. 2019): pre-norm LayerNorm with biases everywhere, learned positions, tied head."""

from __future__ import annotations

from typing import Any

from jaxllm.config import GQA, MLP, Block, Embedding, LayerNorm, Learned, LMHead, Transformer, decoder
from jaxllm.models import common
from jaxllm.models.common import Config, Fields, Row
from jaxllm.rules import Rule, Unused


def gpt2(name: str, layers: int, dim: int, heads: int, vocab: int = 50_257, context: int = 1024) -> Transformer:
    """Head width dim / heads, feed-forward width 4 dim, tanh GELU."""
    attn = GQA(heads, heads, dim // heads, qkv_bias=True, out_bias=True)
    block = Block(attn, MLP(4 * dim, "gelu_tanh", bias=True), LayerNorm())
    stacks = decoder(block, layers=layers)
    return Transformer(vocab, dim, stacks, LayerNorm(), context, Embedding(Learned(context)), LMHead(True), name=name)


def gpt2_small() -> Transformer:
    """124,439,808 parameters."""
    return gpt2("gpt2_small", 12, 768, 12)


def gpt2_medium() -> Transformer:
    """354,823,168 parameters."""
    return gpt2("gpt2_medium", 24, 1024, 16)


def gpt2_large() -> Transformer:
    """774,030,080 parameters."""
    return gpt2("gpt2_large", 36, 1280, 20)


def gpt2_xl() -> Transformer:
    """1,557,611,200 parameters."""
    return gpt2("gpt2_xl", 48, 1600, 25)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "gpt2"
ARCHITECTURES = ("GPT2LMHeadModel",)
PREFIX = "transformer."
PRESETS = (gpt2_small, gpt2_medium, gpt2_large, gpt2_xl)

SUMMARY = {f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")}
FIELDS = Fields(
    read={
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    ignored=frozenset({"n_ctx", "reorder_and_upcast_attn", *SUMMARY}),
)

TOP: tuple[Row, ...] = (
    ("transformer.wte.weight", "embed/tokens", None),
    ("transformer.wpe.weight", "embed/positions", None),
    ("transformer.ln_f.weight", "norm/scale", None),
    ("transformer.ln_f.bias", "norm/bias", None),
    ("lm_head.weight", "head/kernel", None),
)
BLOCK: tuple[Row, ...] = (  # weights are [in, out] here
    ("ln_1.weight", "attn_norm/scale", None),
    ("ln_1.bias", "attn_norm/bias", None),
    ("attn.c_attn.weight", ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel"), "D (X H) -> D X H"),
    ("attn.c_attn.bias", ("attn/q/bias", "attn/k/bias", "attn/v/bias"), "(X H) -> X H"),
    ("attn.c_proj.weight", "attn/o/kernel", "(N H) D -> N H D"),
    ("attn.c_proj.bias", "attn/o/bias", None),
    ("ln_2.weight", "ffn_norm/scale", None),
    ("ln_2.bias", "ffn_norm/bias", None),
    ("mlp.c_fc.weight", "ffn/up/kernel", None),
    ("mlp.c_fc.bias", "ffn/up/bias", None),
    ("mlp.c_proj.weight", "ffn/down/kernel", None),
    ("mlp.c_proj.bias", "ffn/down/bias", None),
)


def from_hf(config: Config) -> Transformer:
    """`scale_attn_by_inverse_layer_idx` divides the scores of layer i (from 0) by i + 1."""
    c = common.read_fields(config, FIELDS)
    dim, heads, norm = c["n_embd"], c["n_head"], LayerNorm(float(c["layer_norm_epsilon"]))
    act = common.activation_from(c["activation_function"], "activation_function")
    ffn = MLP(c["n_inner"] or 4 * dim, act, bias=True)
    plain, by_layer = c["scale_attn_weights"], c["scale_attn_by_inverse_layer_idx"]

    def block(i: int) -> Block:
        usual = (dim // heads) ** -0.5 if plain else 1.0
        scale = None if plain and not by_layer else usual / (i + 1 if by_layer else 1)
        return Block(GQA(heads, heads, dim // heads, qkv_bias=True, out_bias=True, scale=scale), ffn, norm)

    stacks, rows = common.stacks_of([block(i) for i in range(c["n_layer"])]), c["n_positions"]
    vocab, tied = c["vocab_size"], c["tie_word_embeddings"]
    return Transformer(vocab, dim, stacks, norm, rows, Embedding(Learned(rows)), LMHead(tied), name="gpt2")


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    blocks, norm = common.layers_of(spec), spec.norm
    attn, ffn = common.plain_layer(MODEL_TYPE, spec)
    if not (isinstance(ffn, MLP) and isinstance(norm, LayerNorm) and attn.position is None):
        raise common.foreign(MODEL_TYPE, spec)
    act = "gelu_new" if ffn.act == "gelu_tanh" else common.activation_to(ffn.act)
    values = (spec.vocab, spec.context, spec.dim, spec.layers, attn.heads, ffn.hidden, act, norm.eps)
    scales = [block.attn.scale for block in blocks if isinstance(block.attn, GQA)]
    values += (scales[0] != 1.0, len(set(scales)) > 1, spec.tied)
    fields = dict(zip(FIELDS.read, values, strict=True))
    return {"model_type": MODEL_TYPE, "architectures": list(ARCHITECTURES)} | fields


def names(spec: Transformer) -> list[Rule]:
    """q, k and v are one tensor; old files also hold the causal mask."""
    rules = common.table(spec, TOP, "transformer.h.{}.", BLOCK, head="lm_head.weight")
    return [*rules, Unused("*.attn.bias"), Unused("*.attn.masked_bias")]
