"""Published models by name, and toy sizes of them that keep every option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from jaxllm.architectures import Spec
from jaxllm.config import (
    FFN,
    GLU,
    GQA,
    MLA,
    MLP,
    And,
    Attention,
    BigBird,
    Block,
    Cross,
    DynamicNTK,
    EncoderDecoder,
    Llama3,
    Local,
    Longformer,
    LongRope,
    MoE,
    Or,
    Pattern,
    Rope,
    Scaling,
    Stack,
    Transformer,
    TwoTower,
    VisionLanguage,
    Yarn,
)
from jaxllm.models import (
    baichuan,
    bart,
    bert,
    big_bird,
    blip2,
    bloom,
    chatglm,
    clip,
    cohere,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    distilbert,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    llava,
    longformer,
    mistral,
    mixtral,
    mpt,
    mt5,
    olmo,
    olmo2,
    olmoe,
    opt,
    phi,
    phi3,
    qwen2_5_vl,
    qwen2_moe,
    qwen2_vl,
    qwen3,
    qwen3_moe,
    qwen_vl,
    roberta,
    smollm3,
    stablelm,
    starcoder2,
    t5,
)

PRESETS: dict[str, Callable[[], Transformer]] = {
    f.__name__: f
    for f in (
        llama.llama2_7b,
        llama.llama3_8b,
        llama.llama31_8b,
        llama.llama3_70b,
        llama.llama32_1b,
        llama.smollm2_135m,
        llama.qwen2_05b,
        mistral.mistral_7b,
        gpt2.gpt2_small,
        gpt2.gpt2_medium,
        gpt2.gpt2_large,
        gpt2.gpt2_xl,
        gemma2.gemma2_2b,
        llama.yi_6b,
        gemma.gemma_2b,
        gemma3.gemma3_1b,
        cohere.command_r,
        cohere2.command_r7b,
        glm.glm4_9b,
        glm4.glm4_9b_0414,
        granite.granite3_2b,
        smollm3.smollm3_3b,
        baichuan.baichuan_7b,
        baichuan.baichuan2_7b,
        baichuan.baichuan2_13b,
        chatglm.chatglm3_6b,
        qwen3.qwen3_06b,
        qwen3_moe.qwen3_30b_a3b,
        qwen2_moe.qwen15_moe_a27b,
        mixtral.mixtral_8x7b,
        olmo.olmo_1b,
        olmo2.olmo2_7b,
        olmoe.olmoe_1b_7b,
        deepseek_v2.deepseek_v2_lite,
        deepseek_v3.deepseek_v3,
        gpt_oss.gpt_oss_20b,
        gpt_neox.pythia_160m,
        phi3.phi3_mini,
        falcon.falcon_7b,
        falcon.falcon_rw_1b,
        bloom.bloom_560m,
        gptj.gptj_6b,
        phi.phi2,
        stablelm.stablelm2_16b,
        starcoder2.starcoder2_3b,
        mpt.mpt_7b,
        opt.opt_125m,
        opt.opt_350m,
        bert.bert_base,
        bert.bert_large,
        bert.bert_base_pretraining,
        roberta.roberta_base,
        roberta.roberta_large,
        distilbert.distilbert_base,
        big_bird.bigbird_roberta_base,
        longformer.longformer_base,
        longformer.longformer_large,
    )
}

ENCODER_DECODERS: dict[str, Callable[[], EncoderDecoder]] = {
    f.__name__: f
    for f in (
        t5.t5_small,
        t5.t5_base,
        t5.t5_v1_1_small,
        t5.t5_v1_1_base,
        mt5.mt5_small,
        bart.bart_base,
        bart.bart_large,
    )
}

SEEING: dict[str, Callable[[], TwoTower | VisionLanguage]] = {
    f.__name__: f
    for f in (
        clip.clip_vit_b32,
        qwen2_vl.qwen2_vl_2b,
        qwen2_5_vl.qwen25_vl_3b,
        llava.llava15_7b,
        blip2.blip2_opt_27b,
        qwen_vl.qwen_vl,
    )
}

EVERY: dict[str, Callable[[], Spec]] = {**PRESETS, **ENCODER_DECODERS, **SEEING}


def toy(spec: Transformer, *, dim: int = 48, vocab: int = 97, window: int = 5, repeats: int = 2) -> Transformer:
    """The same architecture at toy size: 4 query heads of width 16 (so H != D / N), K < N wherever the model has it.

    Windows shrink to `window` tokens, the vocabulary to `vocab`, learned positions and the context to 64.
    """

    def shrink(pattern: Pattern) -> Pattern:
        match pattern:
            case Local():
                return Local(window)
            case BigBird():
                return replace(pattern, block=2)
            case And(left, right):
                return And(shrink(left), shrink(right))
            case Or(left, right):
                return Or(shrink(left), shrink(right))
            case _:
                return pattern

    def small(block: Block) -> Block:
        cross = block.cross if block.cross is None else Cross(_small_gqa(block.cross.attn), dim)
        attn = _small_attention(block.attn, window)
        attn = attn if isinstance(attn, Longformer) else replace(attn, pattern=shrink(attn.pattern))
        return replace(block, attn=attn, ffn=_small_ffn(block.ffn), cross=cross)

    stacks = tuple(Stack(tuple(map(small, s.pattern)), min(repeats, s.repeats)) for s in spec.stacks)
    e = spec.embed
    embed = replace(
        e,
        position=None if e.position is None else replace(e.position, length=64),
        scale=None if e.scale is None else dim**0.5,
        dim=None if e.dim is None else dim // 2,
    )
    return replace(spec, vocab=vocab, dim=dim, stacks=stacks, context=64, embed=embed, name=f"toy_{spec.name}")


def toy_encoder_decoder(spec: EncoderDecoder) -> EncoderDecoder:
    """Both halves at toy size."""
    return EncoderDecoder(toy(spec.encoder), toy(spec.decoder), min(spec.start, 3), f"toy_{spec.name}")


def _small_attention(attn: Attention, window: int) -> Attention:
    match attn:
        case Longformer():
            return Longformer(4, 16, window - 1)
        case GQA():
            return _small_gqa(attn)
        case MLA():
            ranks = {"q_rank": None if attn.q_rank is None else 20, "kv_rank": 24}
            return replace(
                attn, heads=4, nope_dim=12, rope_dim=8, value_dim=16, position=_small_rope(attn.position, 8), **ranks
            )
        case other:
            assert_never(other)


def _small_gqa(attn: GQA) -> GQA:
    kv = {True: 4, False: 1 if attn.kv_heads == 1 else 2}[attn.kv_heads == attn.heads]
    position = _small_rope(attn.position, 16) if isinstance(attn.position, Rope) else attn.position
    return replace(attn, heads=4, kv_heads=kv, head_dim=16, position=position)


def _small_rope(rope: Rope, width: int) -> Rope:
    """The same rotation for heads of `width`, its long-context scaling begun after 8 tokens."""
    rope = replace(rope, fraction=max(2.0 / width, round(rope.fraction * width / 2) * 2 / width))
    pairs = rope.width(width) // 2
    sections = None if rope.sections is None else _shares(rope.sections, pairs)
    match rope.scaling:
        case LongRope(short, long):
            scaling: Scaling | None = replace(rope.scaling, short=short[:pairs], long=long[:pairs], original=8)
        case DynamicNTK() | Yarn() | Llama3():
            scaling = replace(rope.scaling, original=8)
        case other:
            scaling = other
    return replace(rope, scaling=scaling, sections=sections)


def _shares(sections: tuple[int, ...], pairs: int) -> tuple[int, ...]:
    rest = [max(1, s * pairs // sum(sections)) for s in sections[1:]]
    return (pairs - sum(rest), *rest)


def _small_ffn(ffn: FFN) -> FFN:
    match ffn:
        case MLP() | GLU():
            return replace(ffn, hidden=64)
        case MoE(expert=expert, router=r, shared=shared):
            groups = 2 if r.groups > 1 else 1
            router = replace(r, top_k=min(r.top_k, 3 if groups == 1 else 2), groups=groups, top_groups=1)
            shared = None if shared is None else replace(shared, hidden=40)
            return replace(ffn, expert=replace(expert, hidden=24), experts=8, router=router, shared=shared)
        case other:
            assert_never(other)
