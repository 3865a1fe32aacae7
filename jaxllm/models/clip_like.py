"""What CLIP's towers share with the models that borrow them: fields of their configs, and names of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import GQA, MLP, Block, LayerNorm, Patches, Vision
from jaxllm.models import common
from jaxllm.models.common import Config, Fields, Layered, Row
from jaxllm.rules import Rule, Unused, applicable
from jaxllm.vision import vision_params

IGNORED = frozenset({"initializer_factor", "projection_dim", "dropout", "tf_legacy_loss", "tie_word_embeddings"})
VISION = Fields(
    read={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    ignored=IGNORED | {"vocab_size"},
)
BLOCK: tuple[Row, ...] = (
    ("layer_norm1.weight", "attn_norm/scale", None),
    ("layer_norm1.bias", "attn_norm/bias", None),
    ("self_attn.q_proj.weight", "attn/q/kernel", "(N H) D -> D N H"),
    ("self_attn.q_proj.bias", "attn/q/bias", "(N H) -> N H"),
    ("self_attn.k_proj.weight", "attn/k/kernel", "(N H) D -> D N H"),
    ("self_attn.k_proj.bias", "attn/k/bias", "(N H) -> N H"),
    ("self_attn.v_proj.weight", "attn/v/kernel", "(N H) D -> D N H"),
    ("self_attn.v_proj.bias", "attn/v/bias", "(N H) -> N H"),
    ("self_attn.out_proj.weight", "attn/o/kernel", "D (N H) -> N H D"),
    ("self_attn.out_proj.bias", "attn/o/bias", None),
    ("layer_norm2.weight", "ffn_norm/scale", None),
    ("layer_norm2.bias", "ffn_norm/bias", None),
    ("mlp.fc1.weight", "ffn/up/kernel", "F D -> D F"),
    ("mlp.fc1.bias", "ffn/up/bias", None),
    ("mlp.fc2.weight", "ffn/down/kernel", "D F -> F D"),
    ("mlp.fc2.bias", "ffn/down/bias", None),
)
TOP: tuple[Row, ...] = (
    ("embeddings.class_embedding", "patch/class", None),
    ("embeddings.patch_embedding.weight", "patch/map/kernel", "D C P Q -> (C P Q) D"),
    ("embeddings.position_embedding.weight", "patch/positions", None),
    ("pre_layrnorm.weight", "embed_norm/scale", None),
    ("pre_layrnorm.bias", "embed_norm/bias", None),
    ("post_layernorm.weight", "norm/scale", None),
    ("post_layernorm.bias", "norm/bias", None),
)


def section(config: Config, name: str, fields: Fields) -> dict[str, Any]:
    """The read fields of a part of a config.json; defaults when the part is missing.

    An older `<name>_dict` takes its place altogether, as the reference has it.
    """
    old = config.get(f"{name}_dict")
    given = config.get(name) if old is None else old
    return common.read_fields({"model_type": f"{config.get('model_type')}.{name}"} | dict(given or {}), fields)


def block_of(c: Config, qkv_bias: bool = True) -> Block:
    """A layer of a tower with these read fields."""
    heads, act = c["num_attention_heads"], common.activation_from(c["hidden_act"], "hidden_act")
    if c["hidden_size"] % heads:
        raise ValueError(f"config.json: hidden_size {c['hidden_size']} must be a multiple of its {heads} heads")
    attn = GQA(heads, heads, c["hidden_size"] // heads, qkv_bias=qkv_bias, out_bias=True)
    return Block(attn, MLP(c["intermediate_size"], act, bias=True), LayerNorm(float(c["layer_norm_eps"])))


def side_of(c: Config) -> int:
    """Patches a side. Raises ValueError when patches do not fill the image."""
    if c["image_size"] % c["patch_size"]:
        raise ValueError(
            f"config.json: image_size {c['image_size']} must be a multiple of patch_size {c['patch_size']}"
        )
    return c["image_size"] // c["patch_size"]


def vision_from(c: Config) -> Vision:
    """CLIP's tower, with these read fields."""
    block, patches = block_of(c), Patches(c["patch_size"], c["num_channels"])
    stacks = common.stacks_of([block] * c["num_hidden_layers"])
    norm = block.norm
    return Vision(c["hidden_size"], stacks, patches, side_of(c), class_token=True, embed_norm=norm, norm=norm)


def layer_to(family: str, spec: Layered) -> dict[str, Any]:
    """The fields of a tower's layers. Raises the `foreign` error when they are of another kind."""
    block = common.layers_of(spec)[0]
    attn, ffn, norm = block.attn, block.ffn, block.norm
    if not (isinstance(attn, GQA) and isinstance(ffn, MLP) and isinstance(norm, LayerNorm)):
        raise ValueError(f"{family}: config.json of this family cannot express layers such as {block}")
    return {
        "hidden_size": spec.dim,
        "intermediate_size": ffn.hidden,
        "num_hidden_layers": len(common.layers_of(spec)),
        "num_attention_heads": attn.heads,
        "hidden_act": common.activation_to(ffn.act),
        "layer_norm_eps": norm.eps,
    }


def vision_to(family: str, cfg: Vision, model_type: str = "clip_vision_model") -> dict[str, Any]:
    """The inverse of `vision_from`, in today's style."""
    side, patches = cfg.side or 0, cfg.patches
    pixels = {"num_channels": patches.channels, "image_size": side * patches.size, "patch_size": patches.size}
    return {"model_type": model_type} | layer_to(family, cfg) | pixels


def vision_names(cfg: Vision, prefix: str) -> list[Rule]:
    """The tower's table, its parameters named from its own root; tensors begin with `prefix`."""
    top = [(prefix + name, path, layout) for name, path, layout in TOP]
    sizes = (("C", cfg.patches.channels), ("P", cfg.patches.size))
    rules = common.rows_of(cfg, top, f"{prefix}encoder.layers.{{}}.", BLOCK, sizes)
    return [*applicable(rules, vision_params(cfg)), Unused(f"{prefix}embeddings.position_ids")]


def plain(config: Config, known: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Read fields of the whole config, its parts (`known`) left out."""
    return common.read_fields({k: v for k, v in config.items() if k not in known}, fields)
