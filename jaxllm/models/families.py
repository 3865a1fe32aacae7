"""Every family that can be read and written, by the `model_type` of its config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from jaxllm.architectures import Spec, model_params
from jaxllm.config import EncoderDecoder, Transformer
from jaxllm.convert.rules import Rule, wanted
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
    qwen2,
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
from jaxllm.models.common import layers_of, stacks_of
from jaxllm.models.rope import modern


@runtime_checkable
class Family(Protocol):
    """What a family's module offers; see `jaxllm.models.common`."""

    @property
    def MODEL_TYPE(self) -> str:
        """config.json's `model_type`."""
        ...

    @property
    def ARCHITECTURES(self) -> tuple[str, ...]:
        """Those of config.json's `architectures` that are read; the first is written."""
        ...

    @property
    def PREFIX(self) -> str:
        """What tensor names begin with, unless they were saved without the head."""
        ...

    def from_hf(self, config: Mapping[str, Any]) -> Any:
        """The spec of a config in today's style."""
        ...

    def to_hf(self, spec: Any) -> dict[str, Any]:
        """The config of a spec."""
        ...

    def names(self, spec: Any) -> list[Rule]:
        """The name table."""
        ...


@runtime_checkable
class Settling(Family, Protocol):
    """A family whose config.json leaves something open that the names of a checkpoint's tensors tell."""

    def settle(self, spec: Any, names: Set[str]) -> Any:
        """The spec of a checkpoint with these tensors (their names without PREFIX)."""
        ...


_MODULES: tuple[Family, ...] = (
    llama,
    mistral,
    qwen2,
    gpt2,
    gemma2,
    qwen3,
    qwen3_moe,
    qwen2_moe,
    mixtral,
    olmo,
    olmo2,
    olmoe,
    gemma,
    gemma3,
    cohere,
    cohere2,
    glm,
    glm4,
    granite,
    smollm3,
    baichuan,
    chatglm,
    bert,
    roberta,
    distilbert,
    big_bird,
    longformer,
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    clip,
    gpt_neox,
    phi3,
    falcon,
    bloom,
    gptj,
    phi,
    stablelm,
    starcoder2,
    mpt,
    opt,
    qwen2_vl,
    qwen2_5_vl,
    t5,
    mt5,
    bart,
    llava,
    blip2,
    qwen_vl,
)
FAMILIES: dict[str, Family] = {family.MODEL_TYPE: family for family in _MODULES}


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family that reads this config.json. Raises ValueError for an unknown model type or another head."""
    kind, architectures = config.get("model_type"), tuple(config.get("architectures") or ())
    by_class = [f for f in FAMILIES.values() if kind is None and set(architectures) & set(f.ARCHITECTURES)]
    family = by_class[0] if by_class else FAMILIES.get(str(kind))
    if family is None:
        raise ValueError(
            f"config.json: model_type {kind!r} ({architectures}) is not known; known are {sorted(FAMILIES)}"
        )
    if architectures and not set(architectures) & set(family.ARCHITECTURES):
        raise ValueError(
            f"config.json: architectures of {kind!r} must be one of {list(family.ARCHITECTURES)}, found "
            f"{list(architectures)}; this head is not supported"
        )
    return family


def spec_of_config(config: Mapping[str, Any]) -> Any:
    """The spec of a config.json in either style."""
    return family_of_config(config).from_hf(modern(config))


def renamed(family: Family, name: str) -> str:
    """A tensor's name as the family's table has it: its `RENAMED` lists other prefixes that files may have."""
    for theirs, ours in getattr(family, "RENAMED", ()):
        name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
    return name


def settled(family: Family, spec: Any, names: Iterable[str]) -> Any:
    """The spec of a checkpoint that holds tensors of these names."""
    if not isinstance(family, Settling):
        return spec
    return family.settle(spec, {name.removeprefix(family.PREFIX) for name in names})


def family_of_spec(spec: Spec) -> tuple[Family, dict[str, Any]]:
    """A family whose config.json expresses `spec` exactly, and that config; of several that of the spec's own name.

    Exactly: reading the config, and the names of the tensors, gives the spec back. Raises ValueError when none does.
    """
    for family in sorted(FAMILIES.values(), key=lambda f: spec.name != f.MODEL_TYPE):
        config = expressed(family, spec)
        if config is not None:
            return family, config
    raise ValueError(
        f"no known family's config.json expresses spec {spec.name!r} exactly; known are {sorted(FAMILIES)}"
    )


def expressed(family: Family, spec: Spec) -> dict[str, Any] | None:
    """The family's config of `spec`, None when there is none that reads back as it."""
    if not isinstance(spec, getattr(family, "SPEC", Transformer)):
        return None
    try:
        config = family.to_hf(spec)
        back = settled(family, family.from_hf(config), wanted(family.names(spec), model_params(spec)))
    except ValueError:
        return None
    return config if _canonical(back) == _canonical(spec) else None


def _canonical(spec: Any) -> Any:
    match spec:
        case Transformer():
            return replace(spec, stacks=stacks_of(layers_of(spec)))
        case EncoderDecoder(encoder, decoder):
            return replace(spec, encoder=_canonical(encoder), decoder=_canonical(decoder))
        case _:
            return spec
