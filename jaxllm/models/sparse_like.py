"""What families with mixtures of experts share: fields, names of tensors, and going between dense and sparse layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxllm.config import GLU, GQA, Block, MoE, QKNorm, Transformer
from jaxllm.models.common import Config, Row, foreign, layers_of, with_blocks

TRAINING = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
"""Fields of the losses, and noise that only training has."""

QK_NORMS: tuple[Row, ...] = (
    ("self_attn.q_norm.weight", "attn/q_norm/scale", None),
    ("self_attn.k_norm.weight", "attn/k_norm/scale", None),
)
QK_NORMS_ALL: tuple[Row, ...] = (
    ("self_attn.q_norm.weight", "attn/q_norm/scale", "(N H) -> N H"),
    ("self_attn.k_norm.weight", "attn/k_norm/scale", "(K H) -> K H"),
)
EXPERTS: tuple[Row, ...] = (
    ("mlp.gate.weight", "ffn/router/kernel", "E D -> D E"),
    ("mlp.experts.{}.gate_proj.weight", "ffn/experts/gate/kernel", "F D -> D F"),
    ("mlp.experts.{}.up_proj.weight", "ffn/experts/up/kernel", "F D -> D F"),
    ("mlp.experts.{}.down_proj.weight", "ffn/experts/down/kernel", "D F -> F D"),
)


def shared(name: str) -> tuple[Row, ...]:
    """The rows of the expert that all tokens go through, which files call `name`."""
    return tuple(
        (f"mlp.{name}.{part}_proj.{kind}", f"ffn/shared/{part}/{ours}", layout)
        for part, layout in (("gate", "F D -> D F"), ("up", "F D -> D F"), ("down", "D F -> F D"))
        for kind, ours, layout in (("weight", "kernel", layout), ("bias", "bias", None))
    )


def one_name(config: Config, name: str, other: str) -> dict[str, Any]:
    """The config with field `other`, a second name of `name`, called `name`. Raises ValueError when both differ."""
    out = dict(config)
    second = out.pop(other, None)
    if second is not None and out.setdefault(name, second) != second:
        raise ValueError(f"config.json: {name} is {out[name]!r} and {other}, its other name, {second!r}; keep one")
    return out


def sparse(spec: Transformer, mixture: MoE, layers: Callable[[int], bool]) -> Transformer:
    """The spec with `mixture` in the layers that `layers` says."""
    return with_blocks(spec, lambda i, block: replace(block, ffn=mixture) if layers(i) else block)


def mixture_of(family: str, spec: Transformer) -> tuple[MoE, GLU]:
    """The first mixture and its expert. Raises the `foreign` error when there is none, or its expert is no GLU."""
    for block in layers_of(spec):
        if isinstance(block.ffn, MoE) and isinstance(block.ffn.expert, GLU):
            return block.ffn, block.ffn.expert
    raise foreign(family, spec)


def dense(family: str, spec: Transformer) -> Transformer:
    """The spec with the first dense layer's feed-forward (an expert, if there is none) in place of every mixture."""
    found = [block.ffn for block in layers_of(spec) if not isinstance(block.ffn, MoE)]
    ffn = found[0] if found else mixture_of(family, spec)[1]
    return with_blocks(spec, lambda i, block: replace(block, ffn=ffn) if isinstance(block.ffn, MoE) else block)


def dense_layers(spec: Transformer) -> list[int]:
    """The numbers of the layers without a mixture."""
    return [i for i, block in enumerate(layers_of(spec)) if not isinstance(block.ffn, MoE)]


def attention_of(family: str, spec: Transformer) -> GQA:
    """The first layer's attention. Raises the `foreign` error when it is of another kind."""
    attn = layers_of(spec)[0].attn
    if not isinstance(attn, GQA):
        raise foreign(family, spec)
    return attn


def normalised(block: Block, over: Any, **changes: Any) -> Block:
    """The block with queries and keys normalised as its input is, and other fields of its attention replaced."""
    return replace(block, attn=replace(block.attn, qk_norm=QKNorm(block.norm, over), **changes))
