"""Rotary settings of config.json, in both directions. In today's style all of them stand in `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, assert_never

from jaxllm.config import NTK, DynamicNTK, Linear, Llama3, LongRope, Rope, Scaling, Yarn

Config = Mapping[str, Any]

ORIGINAL = "original_max_position_embeddings"
LOCAL = "sliding_attention"  # layers that may have a rotation of their own
_LOOSE = {  # where older styles keep them -> key of rope_parameters
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}


def modern(config: Config) -> dict[str, Any]:
    """The config with rotary settings in today's `rope_parameters`, whichever style it was written in.

    Raises ValueError when both styles are there and differ.
    """
    out = dict(config)
    given = dict(out.pop("rope_parameters", None) or {})
    if any(isinstance(value, Mapping) for value in given.values()):  # one set per type of layer
        legacy = {"rope_scaling", *_LOOSE}
        return {k: v for k, v in out.items() if k not in legacy or v is not None} | {"rope_parameters": given}
    scaling = dict(out.pop("rope_scaling", None) or {})
    if given and not scaling and "type" not in given:
        given.setdefault("rope_type", "default")
    loose = [{key: out.pop(name, None)} for name, key in _LOOSE.items()]
    sources = [given, scaling, *(one for one in loose if None not in one.values())]
    merged: dict[str, Any] = {}
    for source in sources:
        if "rope_type" in source:
            source.pop("type", None)  # its older name, which then is not read
        for name, given_value in source.items():
            key = "rope_type" if name == "type" else name
            value = "default" if (key, given_value) == ("rope_type", "mrope") else given_value  # has `mrope_section`
            if merged.setdefault(key, value) != value:
                raise ValueError(
                    f"config.json: {key} is {merged[key]!r} in one place and {value!r} in another; keep one"
                )
    if ORIGINAL in out and merged:
        merged[ORIGINAL] = out.pop(ORIGINAL)  # Phi-3 keeps it outside, where it has priority
    return out | ({"rope_parameters": merged} if merged else {})


def classic(config: Config) -> dict[str, Any]:
    """The config as transformers 4 writes it (`rope_theta`, `rope_scaling`, `torch_dtype`), which 5 reads as well."""
    out = dict(config)
    if "dtype" in out:
        out["torch_dtype"] = out.pop("dtype")
    if out.get("rope_parameters"):
        rope = dict(out.pop("rope_parameters"))
        if LOCAL in rope:
            local, rope = rope[LOCAL], dict(rope["full_attention"])
            if local["rope_type"] != "default":
                return out | {"rope_parameters": config["rope_parameters"]}  # transformers 4 cannot say it
            out["rope_local_base_freq"] = local["rope_theta"]
        out |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope.get("rope_type") == "longrope":
            rope["type"] = rope.pop("rope_type")  # Phi-3 reads it by the older name alone
        out["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    if isinstance(out.get("text_config"), Mapping):
        out["text_config"] = classic(out["text_config"])
    return out


# ---------------------------------------------------------------------------------------------------------- reading

Read = Callable[[dict[str, Any], int], Scaling | None]  # (keys besides theta and type, max_position_embeddings)


def rope_from(parameters: Config | None, context: int, defaults: Rope = Rope(), partial: bool = False) -> Rope:
    """A Rope from `rope_parameters`, what they do not name taken from `defaults`.

    context: max_position_embeddings.  partial: whether the family's code looks at `partial_rotary_factor`.
    Refuses unknown types, and unknown or missing keys, by name.
    """
    given = dict(parameters or {})
    theta = given.pop("rope_theta", None)
    fraction = float(given.pop("partial_rotary_factor", defaults.fraction))
    if fraction != defaults.fraction and not partial:
        raise ValueError(f"config.json: partial_rotary_factor must be {defaults.fraction} here, found {fraction}")
    kind = given.pop("rope_type", "default")
    if kind not in _READ:
        raise ValueError(f"config.json: rope_type must be one of {sorted(_READ)}, found {kind!r}; it is not supported")
    needed, optional, read = _READ[kind]
    missing, unknown = sorted(needed - given.keys()), sorted(given.keys() - needed - optional - {ORIGINAL})
    if missing or unknown:
        raise ValueError(
            f"config.json: rope_type {kind!r} needs the keys {sorted(needed)}, may have {sorted(optional)}, found "
            f"{sorted(given)}; correct the file"
        )
    theta = defaults.theta if theta is None else float(theta)
    return Rope(theta, fraction, defaults.interleaved, read(given, context), defaults.sections)


def _original(given: Config, context: int) -> int:
    found = given.get(ORIGINAL)
    return context if found is None else int(found)


def _llama3(given: dict[str, Any], context: int) -> Scaling:
    low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
    return Llama3(float(given["factor"]), low, high, _original(given, context))


def _dynamic(given: dict[str, Any], context: int) -> Scaling:
    if given.get(ORIGINAL, context) != context:
        raise ValueError(
            f"config.json: rope_type 'dynamic' starts at max_position_embeddings={context}, found {ORIGINAL}="
            f"{given[ORIGINAL]}; make them equal"
        )
    return DynamicNTK(float(given["factor"]), context)


def _yarn(given: dict[str, Any], context: int) -> Scaling:
    original = _original(given, context)
    factor = context / original if given.get("factor") is None else float(given["factor"])
    temperature = given.get("attention_factor")
    once, always = given.get("mscale"), given.get("mscale_all_dim")
    if temperature is None and once and always:
        temperature = mscale(factor, once) / mscale(factor, always)
    fast, slow = float(given.get("beta_fast") or 32), float(given.get("beta_slow") or 1)
    warm = None if temperature is None else float(temperature)
    return Yarn(factor, original, fast, slow, warm, bool(given.get("truncate", True)))


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's attention temperature: 0.1 weight ln(factor) + 1, and 1 without extension."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(given: dict[str, Any], context: int) -> Scaling:
    original = _original(given, context)
    factor = context / original if given.get("factor") is None else float(given["factor"])
    temperature = given.get("attention_factor")
    if temperature is None:
        temperature = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = tuple(map(float, given["short_factor"])), tuple(map(float, given["long_factor"]))
    return LongRope(short, long, original, float(temperature))


_READ: dict[str, tuple[set[str], set[str], Read]] = {
    "default": (set(), set(), lambda given, context: None),
    "linear": ({"factor"}, set(), lambda given, context: Linear(float(given["factor"]))),
    "dynamic": ({"factor"}, set(), _dynamic),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set(), _llama3),
    "yarn": (
        set(),
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
        _yarn,
    ),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "attention_factor"}, _longrope),
}
_READ["su"] = _READ["longrope"]  # what early Phi-3 files call it

# ---------------------------------------------------------------------------------------------------------- writing


def rope_to(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` of a Rope; the inverse of `rope_from`."""
    part = {} if rope.fraction == 1.0 else {"partial_rotary_factor": rope.fraction}
    return {"rope_theta": rope.theta} | part | _scaling_to(rope.scaling)


def _scaling_to(scaling: Scaling | None) -> dict[str, Any]:
    match scaling:
        case None:
            return {"rope_type": "default"}
        case Linear(factor):
            return {"rope_type": "linear", "factor": factor}
        case DynamicNTK(factor):
            return {"rope_type": "dynamic", "factor": factor}
        case Llama3(factor, low, high, original):
            bands = {"low_freq_factor": low, "high_freq_factor": high}
            return {"rope_type": "llama3", "factor": factor} | bands | {ORIGINAL: original}
        case Yarn(factor, original, fast, slow, temperature, truncate):
            ramp = {"beta_fast": fast, "beta_slow": slow} | ({} if truncate else {"truncate": False})
            warm = {} if temperature is None else {"attention_factor": temperature}
            return {"rope_type": "yarn", "factor": factor, ORIGINAL: original} | ramp | warm
        case LongRope(short, long, original, temperature):
            lists = {"short_factor": list(short), "long_factor": list(long)}
            return {"rope_type": "longrope"} | lists | {ORIGINAL: original, "attention_factor": temperature}
        case NTK():
            raise ValueError("config.json: NTK has no published form; write its raised theta as rope_theta instead")
        case other:
            assert_never(other)
