"""StableLM (Bellagente et al. 2024): LLaMA with LayerNorm and partial rotary, or attention beside the feed-forward."""

from __future__ import annotations

from typing import Any

from jaxllm.architectures import model_params
from jaxllm.config import GLU, GQA, Block, LayerNorm, LMHead, QKNorm, Rope, Transformer, decoder
from jaxllm.models.common import Config, Fields, activation_from, activation_to, places, read_fields, rope_of
from jaxllm.models.gpt_like import first_layer, head_width, names_with, norm, published, written
from jaxllm.models.llama_like import ATTENTION, GATED
from jaxllm.models.llama_like import TOP as LLAMA_TOP
from jaxllm.models.rope import rope_from, rope_to
from jaxllm.rules import Rule, Tensor, applicable


def stablelm2_16b() -> Transformer:
    """1,644,515,328 parameters: computed from the published config."""
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "vocab_size": 100_352}
    return published(from_hf, "stablelm2_16b", model_type=MODEL_TYPE, use_qkv_bias=True, **shape)


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "stablelm"
ARCHITECTURES = ("StableLmForCausalLM",)
PREFIX = "model."
PRESETS = (stablelm2_16b,)

FIELDS = Fields(
    read={
        "vocab_size": 50_304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "rope_parameters": None,
    },
)

TOP = (*LLAMA_TOP, ("model.norm.bias", "norm/bias", None))
BLOCK = ATTENTION + GATED + norm("input_layernorm", "attn_norm") + norm("post_attention_layernorm", "ffn_norm")


def from_hf(config: Config) -> Transformer:
    """A quarter of each head is rotated unless the config says otherwise."""
    c = read_fields(config, FIELDS)
    dim, heads, context = c["hidden_size"], c["num_attention_heads"], c["max_position_embeddings"]
    eps = float(c["layer_norm_eps"])
    rope = rope_from(c["rope_parameters"], context, Rope(fraction=0.25), partial=True)
    qk_norm = QKNorm(LayerNorm(eps, bias=False), "each") if c["qk_layernorm"] else None
    block = Block(
        GQA(heads, c["num_key_value_heads"], head_width(dim, heads), rope, qkv_bias=c["use_qkv_bias"], qk_norm=qk_norm),
        GLU(c["intermediate_size"], activation_from(c["hidden_act"], "hidden_act")),
        LayerNorm(eps),
        place="shared" if c["use_parallel_residual"] else "pre",
    )
    stacks, head = decoder(block, layers=c["num_hidden_layers"]), LMHead(c["tie_word_embeddings"])
    return Transformer(c["vocab_size"], dim, stacks, LayerNorm(eps), context, head=head, name=MODEL_TYPE)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    block, attn, ffn, layer_norm = first_layer(MODEL_TYPE, spec, GLU)
    rope = rope_of(MODEL_TYPE, spec, attn)
    values = (spec.vocab, spec.dim, ffn.hidden, spec.layers, attn.heads, attn.kv_heads, activation_to(ffn.act))
    values += (spec.context, layer_norm.eps, spec.tied, attn.qkv_bias, attn.qk_norm is not None)
    values += (block.place == "shared", rope_to(rope) | {"partial_rotary_factor": rope.fraction})
    return written(MODEL_TYPE, ARCHITECTURES[0], FIELDS.read, values)


def names(spec: Transformer) -> list[Rule]:
    """The norm of each head's queries and keys is a tensor of its own."""
    _, attn, _, _ = first_layer(MODEL_TYPE, spec, GLU)
    heads = {"q": attn.heads, "k": attn.kv_heads}
    norms = [
        Tensor(
            f"model.layers.{{}}.self_attn.{x}_layernorm.norms.{{}}.weight",
            (f"{at}attn/{x}_norm/scale",),
            None,
            (numbers, range(n)),
        )
        for at, numbers in places(spec)
        for x, n in heads.items()
    ]
    return [*names_with(spec, TOP, "model.layers.{}.", BLOCK), *applicable(norms, model_params(spec))]
