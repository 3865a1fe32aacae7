"""What steers the kernels of a program: the integers that each Pallas call prefetches.

A program computes them itself, from constants and from facts about its batch (which tokens belong together). That part
of the traced program is evaluated here on the host, for given inputs and on demand: nothing else is ever computed.
Loops are looked at in their first turn, `shard_map` on its first device, and the others are taken to be alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

Shapes = tuple[tuple[int, ...], ...]
Lazy = Callable[[], Any]  # an array, or None when it is not known


@dataclass(frozen=True)
class Steering:
    """One Pallas call. shapes: of its operands.  scalars: the prefetched ones, None where they are not known.

    equation: of the traced program; not compared.
    """

    name: str
    shapes: Shapes
    scalars: tuple[tuple[int, ...] | None, ...]
    equation: Any = field(default=None, compare=False, repr=False)


def steering(program: Any, inputs: Sequence[Any]) -> list[Steering]:
    """Every Pallas call of a traced program (`jax.jit(f).trace(...).jaxpr`), in order.

    inputs: a host array for each flat input that is known, None for the others.
    """
    found: list[Steering] = []
    with jax.default_device(jax.devices("cpu")[0]):
        _walk(program, [_constant(x) for x in inputs], found)
    return found


def _constant(x: Any) -> Lazy:
    return lambda: x


def _unknown() -> None:
    return None


def _walk(program: Any, inputs: list[Lazy], found: list[Steering]) -> list[Lazy]:
    """The outputs of a (closed) jaxpr; Pallas calls met on the way are added to `found`."""
    inner = getattr(program, "jaxpr", program)
    held = [*map(_constant, getattr(program, "consts", ())), *inputs]
    values = dict(zip((*inner.constvars, *inner.invars), held, strict=True))

    def read(atom: Any) -> Lazy:
        return _constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in inner.eqns:
        outputs = _outputs(equation, [read(atom) for atom in equation.invars], found)
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in inner.outvars]


def _outputs(equation: Any, args: list[Lazy], found: list[Steering]) -> list[Lazy]:
    """The outputs of one equation, evaluated when they are asked for."""
    params, unknown = equation.params, [_unknown] * len(equation.outvars)
    match equation.primitive.name:
        case "pallas_call":
            found.append(_call(equation, args))
            return unknown
        case "scan":
            return _scan(equation, args, found)
        case "while":
            skipped = params["cond_nconsts"]
            _walk(params["body_jaxpr"], args[skipped:], found)
            return unknown
        case "cond":
            for branch in params["branches"]:
                _walk(branch, args[1:], found)
            return unknown
        case "shard_map":
            return _shard_map(params, args, found)
        case "sharding_constraint" | "optimization_barrier" | "ppermute":
            return args
        case "axis_index" | "all_to_all" | "all_gather" | "psum" | "pmax" | "reduce_scatter" as name:
            return [_constant(np.int32(0))] if name == "axis_index" else unknown
        case _:
            called = [params[name] for name in ("jaxpr", "call_jaxpr") if name in params]
            return _walk(called[0], args, found) if called else _evaluated(equation, args)


def _call(equation: Any, args: list[Lazy]) -> Steering:
    """The shape of each operand, and the scalars, flat: the first `num_index_operands` operands."""
    count = equation.params["grid_mapping"].num_index_operands
    scalars = [arg() for arg in args[:count]]
    shapes = tuple(tuple(atom.aval.shape) for atom in equation.invars)
    return Steering(
        equation.params["name"],
        shapes,
        tuple(None if x is None else tuple(np.asarray(x).ravel().tolist()) for x in scalars),
        equation,
    )


def _scan(equation: Any, args: list[Lazy], found: list[Steering]) -> list[Lazy]:
    """The first turn: what it stacks is taken to be alike in all, what it carries is known only where it stays itself.

    An array of one shape inside and [length, *shape] outside is cut, or stacked.
    """
    body, length = equation.params["jaxpr"], equation.params["length"]
    inner = getattr(body, "jaxpr", body)

    def stacked(outside: Any, inside: Any) -> bool:
        return len(outside.aval.shape) > len(inside.aval.shape)

    sliced = list(map(stacked, equation.invars, inner.invars))
    joined = list(map(stacked, equation.outvars, inner.outvars))
    outputs = _walk(body, [partial(_first, arg) if cut else arg for arg, cut in zip(args, sliced, strict=True)], found)
    whole = [arg for arg, cut in zip(args, sliced, strict=True) if not cut]
    carried = iter(whole[len(whole) - joined.count(False) :])  # behind what all turns share
    return [
        partial(_repeated, x, length) if join else x if x is next(carried) else _unknown
        for x, join in zip(outputs, joined, strict=True)
    ]


def _first(arg: Lazy) -> Any:
    value = arg()
    return None if value is None else value[0]


def _repeated(arg: Lazy, length: int) -> Any:
    value = arg()
    return None if value is None else np.broadcast_to(value, (length, *np.shape(value)))


def _shard_map(params: Any, args: list[Lazy], found: list[Steering]) -> list[Lazy]:
    """What the first device does, on arrays of its shard's shape; what it gives is taken to be alike on all."""
    sizes = dict(params["mesh"].shape)
    local = [partial(_shard, arg, _ways(spec, sizes)) for arg, spec in zip(args, params["in_specs"], strict=True)]
    outputs = _walk(params["jaxpr"], local, found)
    return [partial(_tiled, x, _ways(spec, sizes)) for x, spec in zip(outputs, params["out_specs"], strict=True)]


def _ways(spec: Any, sizes: dict[str, int]) -> list[int]:
    """Into how many parts a PartitionSpec cuts each of the leading axes."""
    names = [() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in spec]
    return [math.prod(sizes[name] for name in axes) for axes in names]


def _shard(arg: Lazy, ways: list[int]) -> Any:
    """The first of the equal parts, of shape [n // way, ...]."""
    value = arg()
    if value is None:
        return None
    return value[tuple(slice(n // way) for n, way in zip(np.shape(value), ways, strict=False))]


def _tiled(arg: Lazy, ways: list[int]) -> Any:
    value = arg()
    return None if value is None else np.tile(value, ways + [1] * (np.ndim(value) - len(ways)))


def _evaluated(equation: Any, args: list[Lazy]) -> list[Lazy]:
    """The outputs of a plain primitive: computed once, when one of them is asked for."""

    @cache
    def run() -> Any:
        values = [arg() for arg in args]
        if any(value is None for value in values):
            return None
        result = equation.primitive.bind(*values, **equation.params)
        # numpy forgets the mesh that an equation inside of a shard_map was traced for
        return list(map(np.asarray, result if equation.primitive.multiple_results else [result]))

    def pick(i: int) -> Any:
        outputs = run()
        return None if outputs is None else outputs[i]

    return [partial(pick, i) for i in range(len(equation.outvars))]
