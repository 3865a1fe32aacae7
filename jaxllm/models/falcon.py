"""Falcon (Almazrouei et al. 2023): multi-query, or groups; attention beside the feed-forward or before it; or ALiBi.

With ALiBi the reference's eager attention adds the slopes twice, once to the scores and once within its mask; its
other implementations, and the code that Falcon-RW was trained with, add them once. Goldens are eager, so that is what
a config means here, unless it says `"attn_implementation": "sdpa"`, which the reference obeys as well.
"""

from __future__ import annotations

from typing import Any, Literal

from jaxllm.config import GQA, MLP, Alibi, Block, LayerNorm, LMHead, Rope, Transformer, decoder
from jaxllm.models.common import Config, Fields, activation_from, activation_to, foreign, layers_of, read_fields
from jaxllm.models.gpt_like import (
    feed_forward,
    first_layer,
    grouped,
    head,
    head_width,
    names_with,
    norm,
    published,
    written,
)
from jaxllm.models.rope import rope_from, rope_to
from jaxllm.rules import Rule


def falcon_7b() -> Transformer:
    """6,921,720,704 parameters, tied."""
    return published(from_hf, "falcon_7b", model_type=MODEL_TYPE)


def falcon_rw_1b() -> Transformer:
    """1,311,625,216 parameters, tied: ALiBi, biases, one branch after the other. Slopes are added once."""
    shape = {"vocab_size": 50_304, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32}
    kind = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "attn_implementation": "sdpa"}
    return published(from_hf, "falcon_rw_1b", model_type=MODEL_TYPE, **shape, **kind)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "falcon"
ARCHITECTURES = ("FalconForCausalLM",)
PREFIX = "transformer."
PRESETS = (falcon_7b, falcon_rw_1b)

SHAPE = {
    "vocab_size": 65_024,
    "hidden_size": 4544,
    "ffn_hidden_size": int,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_kv_heads": int,
    "activation": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "num_ln_in_parallel_attn": int,
    "bias": False,
}
FIELDS = Fields(
    read=SHAPE | {"alibi": False, "attn_implementation": "eager", "rope_parameters": None},
    nullable=frozenset({"new_decoder_architecture", "multi_query", "parallel_attn", "bias", "alibi"}),
    only={"apply_residual_connection_post_layernorm": (False,)},
    aliases={"n_embed": "hidden_size"},
)
TIMES = {"eager": 2.0, "sdpa": 1.0}

TOP = (
    norm("transformer.ln_f", "norm") + head("lm_head") + (("transformer.word_embeddings.weight", "embed/tokens", None),)
)
BLOCK = grouped("self_attention.query_key_value", "self_attention.dense") + feed_forward(
    "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
)
ONE_NORM_EACH = norm("ln_attn", "attn_norm") + norm("ln_mlp", "ffn_norm")
FIRST_NORM = norm("input_layernorm", "attn_norm") + norm("post_attention_layernorm", "ffn_norm")


def from_hf(config: Config) -> Transformer:
    """Refuses the combinations of fields that the reference cannot run either."""
    c = read_fields(config, FIELDS)
    dim, heads, bias = c["hidden_size"], c["num_attention_heads"], bool(c["bias"])
    act, layer_norm = activation_from(c["activation"], "activation"), LayerNorm(float(c["layer_norm_epsilon"]))
    width, context = head_width(dim, heads), c["max_position_embeddings"]
    position = _alibi(c, width) if c["alibi"] else rope_from(c["rope_parameters"], context)
    attn = GQA(heads, _kv_heads(c), width, position, qkv_bias=bias, out_bias=bias)
    block = Block(attn, MLP(c["ffn_hidden_size"] or 4 * dim, act, bias), layer_norm, _place(c))
    stacks, tied = decoder(block, layers=c["num_hidden_layers"]), c["tie_word_embeddings"]
    return Transformer(c["vocab_size"], dim, stacks, layer_norm, context, head=LMHead(tied), name=MODEL_TYPE)


def _alibi(c: Config, width: int) -> Alibi:
    code = c["attn_implementation"]
    if code not in TIMES:
        raise ValueError(f"config.json of falcon: attn_implementation must be one of {sorted(TIMES)}, found {code!r}")
    return Alibi(scale=TIMES[code] * width**-0.5, rounded=True)


def _kv_heads(c: Config) -> int:
    heads, given = c["num_attention_heads"], c["num_kv_heads"] or c["num_attention_heads"]
    if c["new_decoder_architecture"]:
        return given
    if c["multi_query"]:
        return 1
    if given != heads:
        raise ValueError(
            f"config.json of falcon: num_kv_heads must be {heads}, the number of heads, without multi_query and "
            f"new_decoder_architecture, found {given}"
        )
    return heads


def _place(c: Config) -> Literal["pre", "parallel", "shared"]:
    new, parallel, norms = bool(c["new_decoder_architecture"]), bool(c["parallel_attn"]), c["num_ln_in_parallel_attn"]
    match new, parallel, norms:
        case False, False, _:
            return "pre"
        case (_, True, 1) | (False, True, None):
            return "shared"
        case True, True, (None | 2):
            return "parallel"
        case _:
            raise ValueError(
                f"config.json of falcon: num_ln_in_parallel_attn={norms} with new_decoder_architecture={new} and "
                f"parallel_attn={parallel} is no model; the new architecture is parallel with 1 or 2, the old has 1"
            )


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    block, attn, ffn, layer_norm = first_layer(MODEL_TYPE, spec, MLP)
    new = block.place == "parallel" or attn.kv_heads not in (1, attn.heads)
    norms = {"parallel": 2, "shared": 1}.get(block.place)
    match attn.position:
        case Alibi(scale=scale):
            once = scale == attn.head_dim**-0.5
            positions: dict[str, Any] = {"alibi": True, "attn_implementation": "sdpa" if once else "eager"}
        case Rope() as rope:
            positions = {"alibi": False, "rope_parameters": rope_to(rope)}
        case _:
            raise foreign(MODEL_TYPE, spec)
    values = (spec.vocab, spec.dim, ffn.hidden, spec.layers, attn.heads, attn.kv_heads, activation_to(ffn.act))
    values += (spec.context, layer_norm.eps, spec.tied, new, attn.kv_heads == 1, block.place != "pre", norms)
    return written(MODEL_TYPE, ARCHITECTURES[0], SHAPE, (*values, attn.qkv_bias)) | positions


def names(spec: Transformer) -> list[Rule]:
    """Norms are called by what they stand before only where there are two side by side."""
    norms = ONE_NORM_EACH if layers_of(spec)[0].place == "parallel" else FIRST_NORM
    return names_with(spec, TOP, "transformer.h.{}.", norms + BLOCK)
