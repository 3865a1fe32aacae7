"""What family files share: reading config fields strictly, stacks from layers, name tables over all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, assert_never

from jaxllm.architectures import Spec, model_params
from jaxllm.config import (
    GLU,
    GQA,
    MLP,
    Activation,
    Block,
    Full,
    Local,
    MoE,
    Pattern,
    QFormer,
    Rope,
    Stack,
    Transformer,
    Vision,
)
from jaxllm.rules import Alias, Rule, Tensor, Unused, applicable

Config = Mapping[str, Any]
Layered = Transformer | Vision | QFormer

# ---------------------------------------------------------------------------------------------------------- fields

_BOOKKEEPING_TEXT = (
    "_name_or_path _attn_implementation _attn_implementation_autoset architectures model_type transformers_version "
    "dtype torch_dtype torchscript use_bfloat16 use_cache cache_implementation auto_map name id2label label2id "
    "num_labels problem_type finetuning_task task_specific_params return_dict return_dict_in_generate "
    "output_attentions output_hidden_states output_scores output_past tokenizer_class prefix sep_token_id "
    "bos_token_id eos_token_id pad_token_id unk_token_id decoder_start_token_id forced_bos_token_id "
    "forced_eos_token_id max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens num_return_sequences "
    "remove_invalid_values exponential_decay_length_penalty chunk_size_feed_forward initializer_range "
    "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop embedding_dropout gradient_checkpointing "
    "unsloth_version unsloth_fixed transformers.js_config"
)
_BOOKKEEPING = frozenset(_BOOKKEEPING_TEXT.split())
"""Fields that cannot change a logit of a trained decoder: names, ids, generation defaults, dropout, initialisation."""

_PLAIN: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
}
"""Fields of any config with the only values that a plain, full-precision decoder has."""


@dataclass(frozen=True)
class Fields:
    """How a family reads its config.json.

    read: field -> its value when absent, as the reference's config class has it; the value's type is the field's. A
    type in place of a value: null when absent, else of this type.
    nullable: those of `read` that may be null.  zero: those that may be 0, where other whole numbers are at least 1.
    only: field -> the values under which this math holds.
    ignored: further fields that cannot change a logit.  aliases: another name that the config class knows -> field.
    """

    read: Mapping[str, Any]
    nullable: frozenset[str] = frozenset()
    zero: frozenset[str] = frozenset()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)


def read_fields(config: Config, fields: Fields) -> dict[str, Any]:
    """The values of `fields.read`, and the model type.

    Any field that is not known, or has an unsupported value, is refused by name.
    """
    family, config = config.get("model_type"), _renamed(config, fields.aliases)
    only = _PLAIN | dict(fields.only)
    for name, value in config.items():
        if name in only and value not in only[name]:
            allowed = " or ".join(map(repr, only[name]))
            raise ValueError(
                f"config.json of {family}: {name} must be {allowed}, found {value!r}; nothing else is supported"
            )
        if name not in only and name not in fields.read and name not in fields.ignored and name not in _BOOKKEEPING:
            raise ValueError(
                f"config.json of {family}: field {name!r} (value {value!r}) is not known, so it might change the math; "
                "remove it if it does not, or add it to the family's Fields"
            )
    read = {name: _typed(config, name, default, fields) for name, default in fields.read.items()}
    return read | {"model_type": family}


def _renamed(config: Config, aliases: Mapping[str, str]) -> Config:
    out = dict(config)
    for name, own in aliases.items():
        value = out.pop(name, None)
        if value is not None and out.setdefault(own, value) != value:
            raise ValueError(f"config.json: {own} is {out[own]!r}, but {name}, another name of it, {value!r}; keep one")
    return out


def _typed(config: Config, name: str, default: Any, fields: Fields) -> Any:
    optional, least = isinstance(default, type), 0 if name in fields.zero else 1
    kind = default if optional else type(default)
    value = config.get(name, None if optional else default)
    if default is None or (value is None and (optional or name in fields.nullable)):
        return value
    number = kind is float and type(value) is int
    if not number and type(value) is not kind:
        raise ValueError(f"config.json: {name} must be {kind.__name__}, found {value!r}; correct the file")
    if type(value) is int and kind is int and value < least:
        raise ValueError(f"config.json: {name} must be at least {least}, found {value}; correct the file")
    return value


# ------------------------------------------------------------------------------------------------------ activations

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "leaky_relu": "leaky_relu",
    "linear": "identity",
}


def activation_from(name: str, where: str) -> Activation:
    """Our name of an activation; `where` is the field that it was read from."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"config.json: {where} must be one of {sorted(_ACTIVATIONS)}, found {name!r}")
    return _ACTIVATIONS[name]


def activation_to(act: Activation) -> str:
    """The published name of an activation."""
    return {"gelu_tanh": "gelu_pytorch_tanh", "gelu_quick": "quick_gelu", "identity": "linear"}.get(act, act)


# ------------------------------------------------------------------------------------------------- layers, tables


def stacks_of(blocks: Sequence[Block]) -> tuple[Stack, ...]:
    """Stacks that run these layers in order: the shortest repeating pattern and its rest, or runs of equals."""
    layers = tuple(blocks)
    for period in range(1, len(layers) // 2 + 1):
        if layers[period:] == layers[:-period]:
            whole = len(layers) // period
            rest = layers[whole * period :]
            return (Stack(layers[:period], whole), *((Stack(rest, 1),) if rest else ()))
    cuts = [i for i in range(1, len(layers)) if layers[i] != layers[i - 1]]
    starts, ends = [0, *cuts], [*cuts, len(layers)]
    return tuple(Stack((layers[a],), b - a) for a, b in zip(starts, ends, strict=True))


def layers_of(spec: Layered) -> list[Block]:
    """Every layer in order. Raises ValueError for a model of several parts, and for layers that are not independent."""
    if not isinstance(spec, Layered):
        raise ValueError(f"layers_of: a {type(spec).__name__} has no layers of its own; look at its parts")
    if any(stack.shared is not None for stack in spec.stacks):
        raise ValueError(f"{spec}: layers share keys and values; keep it in jaxllm's own format, no other has this")
    return [block for stack in spec.stacks for _ in range(stack.repeats) for block in stack.pattern]


def places(spec: Layered) -> Iterator[tuple[str, range]]:
    """(path of a place, numbers of its layers) for every place in every stack's pattern."""
    first = 0
    for s, stack in enumerate(spec.stacks):
        for b in range(len(stack.pattern)):
            yield f"stacks/{s}/{b}/", range(first + b, first + stack.layers, len(stack.pattern))
        first += stack.layers


def with_blocks(spec: Transformer, change: Callable[[int, Block], Block], **model: Any) -> Transformer:
    """The spec with every layer changed (i counts from 0), and fields of the model replaced."""
    blocks = [change(i, block) for i, block in enumerate(layers_of(spec))]
    return replace(spec, stacks=stacks_of(blocks), **model)


Row = tuple[str, str | tuple[str, ...], str | None]  # their name, our path or paths, layout


def table(
    spec: Transformer,
    top: Sequence[Row],
    prefix: str,
    block: Sequence[Row],
    head: str | None = None,
    sizes: tuple[tuple[str, int], ...] = (),
) -> list[Rule]:
    """A name table: `top` rows once, `block` rows (named under `prefix`, with {} for the layer) at every place.

    A {} in a row's own name counts the experts of the place.  Rows whose parameters this spec does not have are left
    out.  head: the name of a second copy of a tied embedding.
    sizes: letters of the layouts that shapes do not bind.
    """
    rules = rows_of(spec, top, prefix, block, sizes)
    if spec.tied and head is not None:
        rules.append(Alias(head, "embed/tokens"))
    return applicable(rules, model_params(spec))


def rows_of(
    spec: Layered, top: Sequence[Row], prefix: str, block: Sequence[Row], sizes: tuple[tuple[str, int], ...] = ()
) -> list[Rule]:
    """The rules of `table`, those without parameters as well."""
    rules: list[Rule] = [Tensor(name, _tuple(path), layout, (), sizes) for name, path, layout in top]
    for at, numbers in places(spec):
        for name, path, layout in block:
            paths = tuple(at + p for p in _tuple(path))
            each = (numbers, range(_experts(spec, numbers[0]))) if "{}" in name else (numbers,)
            rules.append(Tensor(prefix + name, paths, layout, each, sizes))
    return rules


def within(rules: Sequence[Rule], path: str, name: Callable[[str], str] = lambda name: name) -> list[Rule]:
    """The rules of a part of a model: its parameters lie under `path`, its tensors are renamed by `name`."""
    out: list[Rule] = []
    for rule in rules:
        match rule:
            case Tensor():
                out.append(replace(rule, name=name(rule.name), paths=tuple(path + p for p in rule.paths)))
            case Alias(own, of):
                out.append(Alias(name(own), path + of))
            case Unused(pattern):
                out.append(Unused(pattern if pattern.startswith("*") else name(pattern)))
            case other:
                assert_never(other)
    return out


def _experts(spec: Layered, layer: int) -> int:
    ffn = layers_of(spec)[layer].ffn
    return ffn.experts if isinstance(ffn, MoE) else 0


def _tuple(path: str | tuple[str, ...]) -> tuple[str, ...]:
    return path if isinstance(path, tuple) else (path,)


def plain_layer(family: str, spec: Transformer) -> tuple[GQA, MLP | GLU]:
    """Attention and feed-forward of the first layer. Raises the `foreign` error when they are of another kind."""
    block = layers_of(spec)[0]
    if not isinstance(block.attn, GQA) or isinstance(block.ffn, MoE):
        raise foreign(family, spec)
    return block.attn, block.ffn


def rope_of(family: str, spec: Transformer, attn: GQA) -> Rope:
    """The attention's rotation. Raises the `foreign` error when it has none."""
    if not isinstance(attn.position, Rope):
        raise foreign(family, spec)
    return attn.position


def first_rope(spec: Transformer, default: Rope) -> Rope:
    """The rotation of the first layer that has one."""
    ropes = (block.attn.position for block in layers_of(spec))
    return next((rope for rope in ropes if isinstance(rope, Rope)), default)


def foreign(family: str, spec: Spec) -> ValueError:
    """The error of a spec whose shape the family's config.json cannot express."""
    return ValueError(f"{family}: config.json of this family cannot express spec {spec.name!r}; choose another family")


# -------------------------------------------------------------------------------------------------- layer patterns


def layer_patterns(types: Sequence[str] | None, window: int | None, default: Sequence[Pattern]) -> list[Pattern]:
    """One pattern per layer from `layer_types`, or `default` when it is None. Refuses unknown types by name."""
    if types is None:
        return list(default)
    if len(types) != len(default):
        raise ValueError(f"config.json: layer_types has {len(types)} entries for {len(default)} layers; give one each")
    known = {"full_attention": Full()} | ({"sliding_attention": Local(window)} if window is not None else {})
    unknown = sorted(set(types) - set(known))
    if unknown:
        raise ValueError(
            f"config.json: layer_types {unknown} need one of {sorted(known)} with sliding_window={window}; "
            "set sliding_window, or correct the types"
        )
    return [known[name] for name in types]


def every(period: int, layers: int) -> list[str]:
    """layer_types with a full layer after every `period` - 1 windowed ones."""
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]


def window_fields(patterns: Sequence[Pattern]) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of layers that are full or share a window; inverse of `layer_patterns`."""
    windows = {pattern.window for pattern in patterns if isinstance(pattern, Local)}
    types = ["sliding_attention" if isinstance(pattern, Local) else "full_attention" for pattern in patterns]
    return {"sliding_window": min(windows, default=None), "layer_types": types}
