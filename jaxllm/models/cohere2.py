"""Command R7B (Cohere 2025): three windowed layers with rotary to a global one without any position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, GQA, Block, Full, LayerNorm, LMHead, Local, Rope, Transformer, decoder
from jaxllm.models import common
from jaxllm.models.cohere import COHERE, NORM, config_with, spec_with
from jaxllm.models.common import Config, Fields
from jaxllm.models.llama_like import SHAPE, names_with
from jaxllm.rules import Rule


def command_r7b() -> Transformer:
    """8,028,033,024 parameters, tied."""
    norm, attn = LayerNorm(1e-5, bias=False), GQA(32, 8, 128, Rope(50_000.0, interleaved=True), Local(4096))
    local = Block(attn, GLU(14_336), norm, place="shared")
    globl = replace(local, attn=replace(attn, position=None, pattern=Full()))
    stacks = decoder(local, local, local, globl, layers=32)
    return Transformer(256_000, 4096, stacks, norm, 132_096, head=LMHead(True, scale=0.25), name="command_r7b")


# ------------------------------------------------------------------------------------------------- published format

MODEL_TYPE = "cohere2"
ARCHITECTURES = ("Cohere2ForCausalLM",)
PREFIX = "model."
PRESETS = (command_r7b,)

FIELDS = Fields(
    read=SHAPE | COHERE | {"sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None},
    nullable=frozenset({"sliding_window"}),
    only={  # what the published file says beside
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
    },
    ignored=frozenset({"layer_switch", "use_parallel_embedding", "model_max_length", "pretraining_tp"}),
)


def from_hf(config: Config) -> Transformer:
    """Global layers have no rotary; windowed ones do."""
    c = common.read_fields(config, FIELDS)
    types = c["layer_types"] or common.every(c["sliding_window_pattern"], c["num_hidden_layers"])
    patterns = common.layer_patterns(types, c["sliding_window"], [Full()] * c["num_hidden_layers"])

    def layer(i: int, block: Block) -> Block:
        return block if isinstance(patterns[i], Local) else replace(block, attn=replace(block.attn, position=None))  # type: ignore[call-arg]

    return common.with_blocks(spec_with(c, patterns, False), layer)


def to_hf(spec: Transformer) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    config = config_with(spec, MODEL_TYPE, ARCHITECTURES[0])
    return config | common.window_fields([block.attn.pattern for block in common.layers_of(spec)])


def names(spec: Transformer) -> list[Rule]:
    """LLaMA's table with one norm."""
    return names_with(spec, NORM)
