"""What T5 and mT5 share: blocks with relative biases and unscaled scores, the fields and names of both."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

from jaxllm.config import (
    FFN,
    GLU,
    GQA,
    MLP,
    Block,
    Cross,
    EncoderDecoder,
    LMHead,
    RelativeBias,
    RMSNorm,
    Transformer,
    decoder,
)
from jaxllm.models import common, seq2seq
from jaxllm.models.common import Config, Row
from jaxllm.rules import Rule, Unused


def attention(heads: int, width: int, position: RelativeBias | None) -> GQA:
    """Scores are not scaled."""
    return GQA(heads, heads, width, position, scale=1.0)


def build(
    name: str,
    vocab: int,
    sizes: tuple[int, int, int],
    heads: tuple[int, int],
    ffn: FFN,
    head: LMHead | None,
    buckets: tuple[int, int],
    eps: float,
    start: int,
) -> EncoderDecoder:
    """The spec; buckets: how many, and the furthest distance."""
    (dim, up, down), norm = sizes, RMSNorm(eps)
    cross = Cross(attention(*heads, None), dim)
    low = Block(attention(*heads, RelativeBias(*buckets)), ffn, norm)
    high = Block(attention(*heads, RelativeBias(*buckets, causal=True)), ffn, norm, cross=cross)
    encoder = Transformer(vocab, dim, decoder(low, layers=up), norm, CONTEXT, head=None, causal=False, name=name)
    own = Transformer(vocab, dim, decoder(high, layers=down), norm, CONTEXT, head=head, name=name)
    return EncoderDecoder(encoder, own, start, name)


CONTEXT = 512  # what all of them were trained for; nothing in them ends there


# ------------------------------------------------------------------------------------------------- published format

READ: dict[str, Any] = {
    "vocab_size": 32_128,
    "d_model": 512,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "d_kv": 64,
    "d_ff": 2048,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "dense_act_fn": None,
    "is_gated_act": None,
}
IGNORED = frozenset({"dropout_rate", "classifier_dropout", "initializer_factor", "n_positions"})


def ffn_from(c: Config) -> FFN:
    """`feed_forward_proj`: an activation, or "gated-" and one, "gated-gelu" meaning the tanh approximation."""
    kind, *rest = c["feed_forward_proj"].split("-")
    named = kind if not rest else "gelu_new" if rest == ["gelu"] else rest[-1]
    if len(rest) > 1 or (rest and kind != "gated"):
        raise ValueError(f"config.json: feed_forward_proj must be ACT or gated-ACT, found {c['feed_forward_proj']!r}")
    act = common.activation_from(named if c["dense_act_fn"] is None else c["dense_act_fn"], "feed_forward_proj")
    gated = bool(rest) if c["is_gated_act"] is None else c["is_gated_act"]
    return GLU(c["d_ff"], act) if gated else MLP(c["d_ff"], act)


def spec_from(c: Config, head: LMHead | None, start: int) -> EncoderDecoder:
    """The spec of read fields."""
    sizes = (c["d_model"], c["num_layers"], c["num_decoder_layers"] or c["num_layers"])
    buckets = (c["relative_attention_num_buckets"], c["relative_attention_max_distance"])
    heads, eps = (c["num_heads"], c["d_kv"]), float(c["layer_norm_epsilon"])
    return build(c["model_type"], c["vocab_size"], sizes, heads, ffn_from(c), head, buckets, eps, start)


def has_head(config: Config) -> bool:
    """Whether the class has a head."""
    return not any(name.removeprefix("M").startswith("T5Model") for name in config.get("architectures") or ())


def config_of(spec: EncoderDecoder, model_type: str, name: str) -> dict[str, Any]:
    """The fields of READ. name: what its classes begin with."""
    block, norm = common.layers_of(spec.encoder)[0], spec.decoder.norm
    attn, ffn, foreign = block.attn, block.ffn, f"{model_type}: config.json cannot express spec {spec.name!r}"
    if not (isinstance(attn, GQA) and isinstance(attn.position, RelativeBias)):
        raise ValueError(foreign)
    if not (isinstance(ffn, MLP | GLU) and isinstance(norm, RMSNorm)):
        raise ValueError(foreign)
    gated, act = isinstance(ffn, GLU), "gelu_new" if ffn.act == "gelu_tanh" else common.activation_to(ffn.act)
    kind = f"gated-{act.removesuffix('_new')}" if gated else act
    values = (spec.vocab, spec.dim, spec.encoder.layers, spec.decoder.layers, attn.heads, attn.head_dim, ffn.hidden)
    values += (attn.position.buckets, attn.position.furthest, norm.eps, kind, act, gated)
    suffix = "Model" if spec.head is None else "ForConditionalGeneration"
    names = {"model_type": model_type, "architectures": [f"{name}{suffix}"], "is_encoder_decoder": True}
    return names | dict(zip(READ, values, strict=True)) | {"decoder_start_token_id": spec.start}


def settle(spec: EncoderDecoder, names: Set[str]) -> EncoderDecoder:
    """The head is its own if the checkpoint has one."""
    if spec.head is None:
        return spec
    return replace(spec, decoder=replace(spec.decoder, head=replace(spec.head, tied="lm_head.weight" not in names)))


def attention_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """The four projections."""
    rows = [(f"{theirs}.{name}.weight", f"{ours}/{name}/kernel", "(N H) D -> D N H") for name in "qkv"]
    return (*rows, (f"{theirs}.o.weight", f"{ours}/o/kernel", "D (N H) -> N H D"))


def ffn_rows(layer: int) -> tuple[Row, ...]:
    """The feed-forward, its gate called wi_0."""
    at = f"layer.{layer}.DenseReluDense"
    plain: tuple[Row, ...] = ((f"{at}.wi.weight", "ffn/up/kernel", "F D -> D F"),)
    gated: tuple[Row, ...] = (
        (f"{at}.wi_0.weight", "ffn/gate/kernel", "F D -> D F"),
        (f"{at}.wi_1.weight", "ffn/up/kernel", "F D -> D F"),
    )
    return (*plain, *gated, (f"{at}.wo.weight", "ffn/down/kernel", "D F -> F D"))


def half(which: str, branches: tuple[tuple[str, str], ...], gated: bool) -> seq2seq.Half:
    """Rows of one half. branches: published and own names of its attentions, in order."""
    rows: list[Row] = []
    for layer, (theirs, ours) in enumerate(branches):
        rows += attention_rows(f"layer.{layer}.{theirs}", ours)
        rows.append((f"layer.{layer}.layer_norm.weight", f"{ours}_norm/scale", None))
    last = len(branches)
    rows += [row for row in ffn_rows(last) if (".wi." in row[0]) != gated or ".wo." in row[0]]
    rows.append((f"layer.{last}.layer_norm.weight", "ffn_norm/scale", None))
    bias = f"{which}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    top: list[Row] = [(bias, "relative_bias/table", None), (f"{which}.final_layer_norm.weight", "norm/scale", None)]
    top += [("lm_head.weight", "head/kernel", None)] if which == "decoder" else []
    return top, f"{which}.block.{{}}.", rows


def names(spec: EncoderDecoder) -> list[Rule]:
    """The first layer of a half holds the bias of all its layers; old files have one between the halves too."""
    gated = isinstance(common.layers_of(spec.encoder)[0].ffn, GLU)
    own = ("SelfAttention", "attn")
    halves = half("encoder", (own,), gated), half("decoder", (own, ("EncDecAttention", "cross")), gated)
    return [*seq2seq.names_with(spec, "", *halves), Unused("*.EncDecAttention.relative_attention_bias.weight")]
