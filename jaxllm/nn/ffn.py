"""Feed-forward layers: MLP and gated linear units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import FFN, GLU, MLP, Activation
from jaxllm.leaves import project
from jaxllm.params import Constant, Normal, Param, ParamTree

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def linear_params(inputs: dict[str, int], outputs: dict[str, int], bias: bool, gain: float = 1.0) -> ParamTree:
    """kernel [*inputs, *outputs] with std gain / sqrt(fan in), and bias [*outputs]. Keys are logical axis names."""
    fan_in = 1
    for n in inputs.values():
        fan_in *= n
    kernel = Param((*inputs.values(), *outputs.values()), (*inputs, *outputs), Normal(gain * fan_in**-0.5))
    return {"kernel": kernel} | (
        {"bias": Param(tuple(outputs.values()), tuple(outputs), Constant(0.0))} if bias else {}
    )


def linear(p: Any, x: Float[Array, ...], equation: str) -> Float[Array, ...]:
    """project(x, kernel) + bias if there is one."""
    return project(x, p["kernel"], equation, p.get("bias"))


def ffn_params(cfg: FFN, dim: int, gain: float = 1.0) -> ParamTree:
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


def ffn(p: Any, cfg: FFN, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """MLP: down(act(up(x))). GLU: down(act(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""
    act = ACTIVATIONS[cfg.act]
    up_BTF = linear(p["up"], x_BTD, "BTD,DF->BTF")
    match cfg:
        case MLP():
            hidden_BTF = act(up_BTF)
        case GLU():
            hidden_BTF = act(linear(p["gate"], x_BTD, "BTD,DF->BTF")) * up_BTF
        case other:
            assert_never(other)
    return linear(p["down"], hidden_BTF, "BTF,FD->BTD")
