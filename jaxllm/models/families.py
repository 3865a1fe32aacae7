"""Every family that can be read and written, by the `model_type` of its config.json: found, not listed.

A family is a file of this package that defines what `Family` describes. Nothing else needs to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import MISSING, dataclass, fields, replace
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from jaxllm import models
from jaxllm.architectures import Spec, model_params
from jaxllm.config import EncoderDecoder, Transformer
from jaxllm.models.common import layers_of, stacks_of
from jaxllm.models.rope import modern
from jaxllm.rules import Rule, wanted


@dataclass(frozen=True)
class Family:
    """What a family's file defines, under these names; those with a value here may be left out.

    MODEL_TYPE: config.json's `model_type`.
    ARCHITECTURES: those of config.json's `architectures` that are read; the first is written.
    PREFIX: what tensor names begin with, unless they were saved without the head.
    from_hf: the spec of a config in today's style: every field that changes the math, or a ValueError that names it.
    to_hf: the inverse; ValueError for a spec that this config.json cannot express.
    names: the name table of a spec.
    PRESETS: functions that give the specs of published models, by whose names they are known.
    SPEC: the kind of spec.
    RENAMED: (theirs, ours) for prefixes of tensor names that some files have instead of the table's.
    PREFERRED: of several families that express a spec, and none of its name, the one to write.
    settle: the spec of a checkpoint with tensors of these names (without PREFIX), where config.json leaves it open.
    """

    MODEL_TYPE: str
    ARCHITECTURES: tuple[str, ...]
    PREFIX: str
    from_hf: Callable[[Mapping[str, Any]], Any]
    to_hf: Callable[[Any], dict[str, Any]]
    names: Callable[[Any], list[Rule]]
    PRESETS: tuple[Callable[[], Spec], ...] = ()
    SPEC: type = Transformer
    RENAMED: tuple[tuple[str, str], ...] = ()
    PREFERRED: bool = False
    settle: Callable[[Any, Set[str]], Any] = lambda spec, names: spec


def modules() -> list[ModuleType]:
    """The files of this package, but for the two that ask, imported: PREFERRED families first, then by name."""
    found = sorted({m.name for m in iter_modules(models.__path__)} - {"families", "presets"})
    imported = [import_module(f"{models.__name__}.{name}") for name in found]
    return sorted(imported, key=lambda module: not getattr(module, "PREFERRED", False))


def family_of_module(module: ModuleType) -> Family:
    """The family that a file defines. Raises ValueError when it lacks something."""
    given = {f.name: getattr(module, f.name) for f in fields(Family) if hasattr(module, f.name)}
    missing = [f.name for f in fields(Family) if f.default is MISSING and f.name not in given]
    if missing:
        raise ValueError(f"{module.__file__}: a family's file must define {missing} too; see jaxllm.models.families")
    return Family(**given)


FAMILIES: dict[str, Family] = {
    family.MODEL_TYPE: family for family in (family_of_module(m) for m in modules() if hasattr(m, "MODEL_TYPE"))
}


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
    """A tensor's name as the family's table has it."""
    for theirs, ours in family.RENAMED:
        name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
    return name


def settled(family: Family, spec: Any, names: Iterable[str]) -> Any:
    """The spec of a checkpoint that holds tensors of these names."""
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
    if not isinstance(spec, family.SPEC):
        return None
    try:
        config = family.to_hf(spec)
        back = settled(family, family.from_hf(config), wanted(family.names(spec), model_params(spec)))
        return config if _canonical(back) == _canonical(spec) else None
    except ValueError:
        return None


def _canonical(spec: Any) -> Any:
    match spec:
        case Transformer():
            return replace(spec, stacks=stacks_of(layers_of(spec)))
        case EncoderDecoder(encoder, decoder):
            return replace(spec, encoder=_canonical(encoder), decoder=_canonical(decoder))
        case _:
            return spec
