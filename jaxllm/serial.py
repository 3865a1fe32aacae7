"""Frozen dataclasses to tagged JSON and back, and typed overrides by dotted path.

Each value carries its type's name, so that a sum type reads back as the variant it was:
{"type": "Rope", "theta": 10000.0, ...}. Unknown types, unknown fields and values of the wrong type are errors that
name the nearest valid choice: a config that is silently half-read is the worst kind.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

SCHEMA = 1


def encode(value: Any) -> Any:
    """A dataclass, tuple or scalar as JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__} | fields
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"encode: {value!r} of type {type(value).__name__} has no JSON form; use dataclasses and scalars")


def decode(data: Any, kinds: Mapping[str, type]) -> Any:
    """The inverse of `encode`. kinds: type name -> dataclass, everything the data may hold.

    Raises ValueError for an unknown type or field, naming the nearest known one. A missing field takes its default.
    """
    if isinstance(data, list):
        return tuple(decode(v, kinds) for v in data)
    if not isinstance(data, dict):
        return data
    name = str(data.get("type"))
    if name not in kinds:
        raise ValueError(f"config: unknown type {name!r}{_near(name, kinds)}")
    kind = kinds[name]
    known = {f.name for f in dataclasses.fields(kind)}
    for key in data.keys() - {"type"} - known:
        raise ValueError(f"config: {name} has no field {key!r}{_near(key, known)}")
    return kind(**{k: decode(v, kinds) for k, v in data.items() if k != "type"})


def dumps(value: Any) -> str:
    """JSON text with the schema version on top."""
    return json.dumps({"schema": SCHEMA, "value": encode(value)}, indent=1)


def loads(text: str, kinds: Mapping[str, type]) -> Any:
    """The inverse of `dumps`. Raises ValueError when the text is no such JSON or of another schema."""
    try:
        data = json.loads(text)
        schema = data["schema"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"config: not a jaxllm config JSON ({error})") from error
    if schema != SCHEMA:
        raise ValueError(f"config: schema {schema} was written by another version; this one reads schema {SCHEMA}")
    return decode(data["value"], kinds)


def kinds_of(*modules: types.ModuleType) -> dict[str, type]:
    """Every dataclass that the modules (or, for packages, theirs) define, by name."""
    found = {}
    for module in modules:
        for name, kind in vars(module).items():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and _inside(kind, module):
                found[name] = kind
    return found


def _inside(kind: type, module: types.ModuleType) -> bool:
    return kind.__module__ == module.__name__ or kind.__module__.startswith(module.__name__ + ".")


# ------------------------------------------------------------------------------------------------------- overrides


def override(value: Any, assignments: Iterable[str]) -> Any:
    """Apply "dotted.path=text" assignments to a frozen dataclass; texts are read by the field's type.

    Tuples are addressed by index (`data.sources.0.weight=2`). "none" gives None where the type allows it.
    Raises ValueError for an unknown path (naming the nearest valid one) or a text of the wrong type.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, eq, text = assignment.partition("=")
        if not eq:
            raise ValueError(f"override {assignment!r} must look like path=value, e.g. optimizer.peak_lr=3e-4")
        if not _put(changes, path.split("."), text):  # a field of what an earlier one replaces, or the other way round
            value, changes = _changed(value, changes, "", value), {}
            _put(changes, path.split("."), text)
    return _changed(value, changes, "", value)


def _put(changes: dict[str, Any], keys: list[str], text: str) -> bool:
    """Note a text under its path; False when part of the path, or something below it, is noted already."""
    *above, last = keys
    for key in above:
        changes = changes.setdefault(key, {})
        if not isinstance(changes, dict):
            return False
    if isinstance(changes.get(last), dict):
        return False
    changes[last] = text
    return True


def _changed(value: Any, changes: Mapping[str, Any], prefix: str, root: Any) -> Any:
    """A record or tuple with all its changes at once: fields that belong together are checked together."""
    new: dict[str, Any] = {}
    for key, change in changes.items():
        path = prefix + key
        if isinstance(value, tuple):
            if not key.isdigit() or int(key) >= len(value):
                raise ValueError(f"override {path}: {key!r} must be an index below {len(value)}")
            old, hint = value[int(key)], type(value[int(key)])
        else:
            if not dataclasses.is_dataclass(value) or key not in (hints := _hints(type(value))):
                whole = path + _first_path(change)
                raise ValueError(f"override: unknown path {whole!r}{_near(whole, _paths(root))}")
            old, hint = getattr(value, key), hints[key]
        below = isinstance(change, dict)
        new[key] = _changed(old, change, f"{path}.", root) if below else _parse(change, hint, path)
    if isinstance(value, tuple):
        return tuple(new.get(str(i), x) for i, x in enumerate(value))
    record: Any = value
    return dataclasses.replace(record, **new)


def _first_path(change: Any) -> str:
    """The rest of the first path in nested changes."""
    return next((f".{key}{_first_path(x)}" for key, x in change.items()), "") if isinstance(change, dict) else ""


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _parse(text: str, hint: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() in ("none", "null"):
            return None
        errors = []
        for arg in (arg for arg in args if arg is not type(None)):
            try:
                return _parse(text, arg, path)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError("; or ".join(errors))
    if origin is typing.Literal:
        for choice in args:
            if str(choice) == text:
                return choice
        raise ValueError(f"override {path}={text}: must be one of {', '.join(map(str, args))}")
    if origin is tuple:
        if args[0] is not str:  # brackets and spaces are a text's own
            text = text.strip().removeprefix("[").removesuffix("]").replace(" ", "")
        return tuple(_parse(part, args[0], path) for part in text.split(",") if part)
    return _scalar(text, hint, path)


def _scalar(text: str, hint: Any, path: str) -> Any:
    try:
        if hint is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if hint is int:
            number = float(text.replace("_", ""))
            if number != int(number):
                raise ValueError
            return int(number)
        if hint is float:
            return float(text)
        if hint is str:
            return text
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"override {path}={text}: must be {hint.__name__}") from None
    raise ValueError(
        f"override {path}={text}: a {getattr(hint, '__name__', hint)} is set field by field, or in the file"
    )


def _paths(value: Any, prefix: str = "") -> list[str]:
    if isinstance(value, tuple):
        return [p for i, v in enumerate(value) for p in _paths(v, f"{prefix}{i}.")]
    if not dataclasses.is_dataclass(value):
        return []
    out = []
    for f in dataclasses.fields(value):
        out += [prefix + f.name, *_paths(getattr(value, f.name), f"{prefix}{f.name}.")]
    return out


def _near(word: str, choices: Iterable[str]) -> str:
    choices = sorted(choices)
    hits = difflib.get_close_matches(word, choices, 1, 0.5) or [
        c for c in choices if c.endswith("." + word.rsplit(".", maxsplit=1)[-1])
    ]
    return f"; did you mean {hits[0]!r}?" if hits else f"; valid: {', '.join(choices[:40])}"
