"""Names of Qwen-VL's tensors."""

from __future__ import annotations

from dataclasses import replace

from jaxllm.architectures import model_params
from jaxllm.config import GQA, VisionLanguage
from jaxllm.models.common import Row, layers_of, rows_of, table, within
from jaxllm.rules import Rule, Unused, applicable


def _pair(theirs: str, ours: str, layout: str | None = None) -> tuple[Row, Row]:
    kernel = "scale" if layout is None else "kernel"
    return (f"{theirs}.weight", f"{ours}/{kernel}", layout), (f"{theirs}.bias", f"{ours}/bias", None)


QKV = ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel")
QKV_BIAS = ("attn/q/bias", "attn/k/bias", "attn/v/bias")
TEXT_TOP: tuple[Row, ...] = (
    ("transformer.wte.weight", "embed/tokens", None),
    ("transformer.ln_f.weight", "norm/scale", None),
    ("lm_head.weight", "head/kernel", None),
)
TEXT: tuple[Row, ...] = (
    ("ln_1.weight", "attn_norm/scale", None),
    ("attn.c_attn.weight", QKV, "(X H) D -> D X H"),
    ("attn.c_attn.bias", QKV_BIAS, "(X H) -> X H"),
    ("attn.c_proj.weight", "attn/o/kernel", "D (N H) -> N H D"),
    ("ln_2.weight", "ffn_norm/scale", None),
    ("mlp.w1.weight", "ffn/up/kernel", "F D -> D F"),
    ("mlp.w2.weight", "ffn/gate/kernel", "F D -> D F"),
    ("mlp.c_proj.weight", "ffn/down/kernel", "D F -> F D"),
)
TOWER_TOP: tuple[Row, ...] = (
    ("transformer.visual.conv1.weight", "patch/map/kernel", "D C P Q -> (C P Q) D"),
    ("transformer.visual.positional_embedding", "patch/positions", None),
    *_pair("transformer.visual.ln_pre", "embed_norm"),
)
TOWER: tuple[Row, ...] = (  # q, k and v of one head after one another
    *_pair("ln_1", "attn_norm"),
    ("attn.in_proj.weight", QKV, "(N X H) D -> D (N X) H"),
    ("attn.in_proj.bias", QKV_BIAS, "(N X H) -> (N X) H"),
    *_pair("attn.out_proj", "attn/o", "D (N H) -> N H D"),
    *_pair("ln_2", "ffn_norm"),
    *_pair("mlp.c_fc", "ffn/up", "F D -> D F"),
    *_pair("mlp.c_proj", "ffn/down", "D F -> F D"),
)
POOL: tuple[Row, ...] = (
    ("transformer.visual.attn_pool.query", "queries", None),
    ("transformer.visual.attn_pool.kv_proj.weight", "inputs/kernel", "E D -> D E"),
    ("transformer.visual.attn_pool.attn.in_proj_weight", QKV, "(X H) D -> D X H"),
    ("transformer.visual.attn_pool.attn.in_proj_bias", QKV_BIAS, "(X H) -> X H"),
    *_pair("transformer.visual.attn_pool.attn.out_proj", "attn/o", "D (N H) -> N H D"),
    *_pair("transformer.visual.attn_pool.ln_q", "query_norm"),
    *_pair("transformer.visual.attn_pool.ln_kv", "key_norm"),
    *_pair("transformer.visual.ln_post", "norm"),
    ("transformer.visual.proj", "out/kernel", None),
)


def names(spec: VisionLanguage) -> list[Rule]:
    """The resampler's sinusoids are in the files too; they are computed here."""
    cfg, block = spec.vision, layers_of(spec.vision)[0]
    assert isinstance(block.attn, GQA), "from_hf gives plain attention"
    sizes = (("C", 3), ("P", cfg.patches.size), ("N", block.attn.heads))
    text = within(table(spec.text, TEXT_TOP, "transformer.h.{}.", TEXT, "lm_head.weight"), "text/")
    tower = within(rows_of(cfg, TOWER_TOP, "transformer.visual.transformer.resblocks.{}.", TOWER, sizes), "vision/")
    pool = within(rows_of(replace(cfg, stacks=()), POOL, "", ()), "adapter/")
    unused = ("transformer.visual.attn_pool.pos_embed", "*.rotary_emb.inv_freq", "*.attn.masked_bias")
    return [*text, *applicable([*tower, *pool], model_params(spec)), *map(Unused, unused)]
