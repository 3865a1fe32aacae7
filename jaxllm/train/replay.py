"""Why a step was not finite: its batch is run once more, watching every layer.

A bad step leaves the weights as they were, and a batch is a pure function of the step, so both are at hand. Activations
are watched first, in the order of the forward pass. When all of them are finite the gradients are, and there the first
bad layer is the *last* one of the forward pass: from it the fault spreads back to the embedding.

One tap is kept at a time, of one micro-batch: as much memory as training with full rematerialisation takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jaxllm.config import Transformer
from jaxllm.experiment import Balance, Experiment
from jaxllm.nn.norm import norm
from jaxllm.objectives.lm import inputs_of, lm_loss
from jaxllm.objectives.logprobs import token_logprobs
from jaxllm.params import Param, map_params, paths
from jaxllm.records import Batch, Params
from jaxllm.runtime import Runtime
from jaxllm.sharding import constrain
from jaxllm.train.step import deal, gradients
from jaxllm.transformer import forward, transformer_params

MOST_NAMED = 4  # parameters that a report lists


def explain(exp: Experiment, params: Params, batch: Batch, i: int) -> str:
    """The first place at which the step with index i, on `batch` [B, T], was not finite, as a clause of a report.

    Call it on the context mesh of the run. Compiles up to three programs.
    """
    how = exp.model, exp.runtime, exp.accumulate, exp.balance
    place = first_bad_activation(exp, params, batch)
    if place is not None:
        weights = list(_bad(exp.model, _finite_weights(exp.model, exp.runtime, params)))
        held = f"; weights that are not finite: {_listed(weights)}" if weights else ""
        return f"replayed, its first activations that are not finite are those of {place}{held}"
    with jax.transfer_guard("allow"):
        key = jax.random.fold_in(jax.random.key(exp.seed), i)
        floor = jnp.float32(exp.optimizer.loss_scale.floor)  # where an overflow is a bad step
    bad = _bad(exp.model, _finite_gradients(*how, params, batch, key, floor))
    if not bad:
        return "replayed, it is finite: the fault does not repeat, so suspect the machine before the model"
    last = max(bad.values())
    return (
        "replayed, all its activations are finite; its gradients, or their squares, are not, from "
        f"{place_names(exp.model)[last]} backwards: {_listed([path for path, rank in bad.items() if rank == last])}"
    )


def place_names(spec: Transformer) -> list[str]:
    """Embedding, every layer (counted from 0, and as the parameters count it), final norm, head: in forward order."""
    layers = [
        f"stacks/{s}/{b}[{r}]"
        for s, stack in enumerate(spec.stacks)
        for r in range(stack.repeats)
        for b in range(len(stack.pattern))
    ]
    named = [f"layer {n} of {spec.layers}, counted from 0 ({path})" for n, path in enumerate(layers)]
    return ["the embedding", *named, "the final norm", "the head"]


# ----------------------------------------------------------------------------------------------------- activations


def first_bad_activation(exp: Experiment, params: Params, batch: Batch) -> str | None:
    """Where the forward pass is first not finite, down to the half of a layer; None when it is finite throughout."""
    watch = partial(_watch, exp.model, exp.runtime, exp.accumulate)
    bad = np.flatnonzero(~jax.device_get(watch("residual", params, batch)))
    if not len(bad):
        return None
    place = place_names(exp.model)[bad[0]]
    if not 1 <= bad[0] <= exp.model.layers:
        return place
    attention_L = jax.device_get(watch("attn", params, batch))
    return f"{place}, its {'feed-forward' if attention_L[bad[0] - 1] else 'attention'}"


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _watch(
    spec: Transformer, runtime: Runtime, accumulate: int, tap: str, params: Params, batch: Batch
) -> Bool[Array, " L+3"]:
    """Whether the tap of each layer, the last layer's output, the final norm's and the log-probabilities are finite.

    With the tap "residual", what goes into each layer, that is one flag per place of `place_names`.
    """
    tapped = replace(runtime, taps=(tap,))

    def micro(batch: Batch) -> Bool[Array, " L+3"]:
        out = forward(params, replace(spec, norm=None), inputs_of(batch), tapped)
        normed = out.hidden_BTD if spec.norm is None else norm(params["norm"], spec.norm, out.hidden_BTD)
        logprob_BT = token_logprobs(params, spec, normed, batch.target_BT, runtime)
        ends = (out.hidden_BTD, normed, jnp.where(batch.weight_BT > 0, logprob_BT, 0.0))
        layers_L = jnp.isfinite(out.aux.taps[tap]).all((1, 2, 3))
        return jnp.concatenate([layers_L, jnp.stack([jnp.isfinite(x).all() for x in ends])])

    return constrain(jax.lax.map(micro, deal(batch, accumulate)).all(0), (None,), runtime.layout)


# ------------------------------------------------------------------------------------------- parameters, gradients


@partial(jax.jit, static_argnums=(0, 1))
def _finite_weights(spec: Transformer, runtime: Runtime, values: Params) -> dict[str, Bool[Array, "*L"]]:
    """Path -> whether a parameter's values are finite: [L] for one that is stacked, [] for the others."""

    def one(declared: Param, x: Array) -> Array:
        first = 1 if declared.axes[0] == "layers" else 0
        return constrain(jnp.isfinite(x).all(tuple(range(first, x.ndim))), (None,) * first, runtime.layout)

    return dict(paths(map_params(one, transformer_params(spec), values)))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _finite_gradients(
    spec: Transformer,
    runtime: Runtime,
    accumulate: int,
    balance: Balance,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    floor: Float[Array, ""],
) -> dict[str, Bool[Array, "*L"]]:
    """The same of the gradients' squares: in their sum, the norm, these overflow first. floor: of float16's scale."""

    def loss(params: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], dict[str, Array]]:
        return lm_loss(params, spec, batch, runtime, key, balance=balance)

    scale = floor if runtime.compute_dtype == "float16" else None  # there the sum over tokens would overflow
    grads = gradients(loss, transformer_params(spec), params, batch, key, runtime, accumulate, scale)[2]
    return _finite_weights(spec, runtime, jax.tree.map(jnp.square, grads))


def _bad(spec: Transformer, finite: dict[str, Bool[Array, "*L"]]) -> dict[str, int]:
    """Parameters that are not finite, "stacks/0/0/attn/q/kernel[2]" -> which of `place_names` they belong to."""
    return dict(_each_bad(spec, jax.device_get(finite)))


def _each_bad(spec: Transformer, finite: dict[str, Bool[np.ndarray, "*L"]]) -> Iterator[tuple[str, int]]:
    ends = {"norm": spec.layers + 1, "head": spec.layers + 2, "classifiers": spec.layers + 2}
    starts = np.cumsum([1, *(stack.layers for stack in spec.stacks)])
    for path, flags in finite.items():
        match path.split("/"):
            case ["stacks", s, b, *_]:
                for r in np.flatnonzero(~flags):
                    yield f"{path}[{r}]", int(starts[int(s)] + r * len(spec.stacks[int(s)].pattern) + int(b))
            case ["shared", s, *_] if not flags:
                yield path, int(starts[int(s)])
            case [room, *_] if not flags:
                yield path, ends.get(room, 0)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return shown if len(names) <= MOST_NAMED else f"{shown} and {len(names) - MOST_NAMED} more"
