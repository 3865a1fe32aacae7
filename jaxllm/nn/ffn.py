"""Feed-forward layers: MLP and gated linear units; mixtures of them are in `moe`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import GLU, MLP, Activation
from jaxllm.leaves import project
from jaxllm.params import Constant, Normal, Param, ParamTree
from jaxllm.remat import named
from jaxllm.sharding import Layout, inside

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "leaky_relu": jax.nn.leaky_relu,
    "identity": lambda x: x,
}


def linear_params(inputs: dict[str, int], outputs: dict[str, int], bias: bool, gain: float = 1.0) -> ParamTree:
    """kernel [*inputs, *outputs] with std gain / sqrt(fan in), and bias [*outputs]. Keys are logical axis names."""
    shape, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
    kernel = Param(shape, axes, Normal(gain * math.prod(inputs.values()) ** -0.5), outputs=len(outputs))
    return {"kernel": kernel} | (
        {"bias": Param(tuple(outputs.values()), tuple(outputs), Constant(0.0))} if bias else {}
    )


def linear(p: Any, x: Float[Array, ...], equation: str) -> Float[Array, ...]:
    """project(x, kernel) + bias if there is one."""
    return project(x, p["kernel"], equation, p.get("bias"))


def dense_params(cfg: MLP | GLU, dim: int, gain: float = 1.0) -> ParamTree:
    """up [D, F], gate [D, F] for a GLU, down [F, D] (started at `gain` times the usual scale)."""
    up = linear_params({"embed": dim}, {"ffn": cfg.hidden}, cfg.bias)
    down = linear_params({"ffn": cfg.hidden}, {"embed": dim}, cfg.bias, gain)
    match cfg:
        case MLP():
            return {"up": up, "down": down}
        case GLU():
            return {"gate": up, "up": up, "down": down}
        case other:
            assert_never(other)


def activate(cfg: MLP | GLU, up: Float[Array, "... F"], gate: Float[Array, "... F"] | None) -> Float[Array, "... F"]:
    """What goes into the down projection: act(up), or act(gate) * (up + offset), within `limit`. gate: a GLU's."""
    act = ACTIVATIONS[cfg.act]
    match cfg:
        case MLP():
            return act(up)
        case GLU(limit=limit, offset=offset, beta=beta):
            assert gate is not None, "activate: a GLU has a gate"
            gate = gate if limit is None else jnp.minimum(gate, limit)
            up = up if limit is None else jnp.clip(up, -limit, limit)
            gate = act(gate) if beta == 1.0 else act(gate * beta) / beta
            return gate * (up + offset if offset else up)
        case other:
            assert_never(other)


def dense_ffn(
    p: Any, cfg: MLP | GLU, x_BTD: Float[Array, "B T D"], layout: Layout | None = None
) -> Float[Array, "B T D"]:
    """MLP: down(act(up(x))). GLU: down(act(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""
    up_BTF = named(linear(p["up"], x_BTD, "BTD,DF->BTF"), "up")
    gate_BTF = named(linear(p["gate"], x_BTD, "BTD,DF->BTF"), "gate") if isinstance(cfg, GLU) else None
    hidden_BTF = inside(activate(cfg, up_BTF, gate_BTF), "ffn", layout, last="ffn")
    return named(linear(p["down"], hidden_BTF, "BTF,FD->BTD"), "down")
