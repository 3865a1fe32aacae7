"""Dynamic loss scaling for gradients in float16 (Micikevicius et al. 2018): a few counters and pure functions.

A scale that was too great is not a bad step: it costs one step, and counts as "overflows". Once the scale is at its
floor there is nothing left to try, and a step that is not finite is what it is everywhere else.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxllm.experiment import Experiment, LossScale

GREATEST = 2.0**24


def scaling_of(exp: Experiment) -> LossScale | None:
    """The scaling that an experiment needs: float16's smallest gradients would be 0; other dtypes have room."""
    return exp.optimizer.loss_scale if exp.runtime.compute_dtype == "float16" else None


def fresh_scale(scaling: LossScale | None) -> dict[str, Array]:
    """What `TrainState.extra` holds of it at first: "loss_scale" float32 [], "good_streak" and "overflows" int32 []."""
    if scaling is None:
        return {}
    zeros = {name: jnp.zeros((), jnp.int32) for name in ("good_streak", "overflows")}
    return {"loss_scale": jnp.full((), scaling.start, jnp.float32)} | zeros


def counters(extra: dict[str, Array], good: Bool[Array, ""], scaling: LossScale | None) -> dict[str, Array]:
    """The counters after a step that was good, or not finite and skipped."""
    if scaling is None:
        bad, more = ~good, {}
    else:
        scale = extra["loss_scale"]
        bad = ~good & (scale <= scaling.floor)
        streak = jnp.where(good, extra["good_streak"] + 1, 0)
        grown = streak >= scaling.growth_every
        factor = jnp.where(good, jnp.where(grown, 2.0, 1.0), 0.5)
        more = {
            "loss_scale": jnp.clip(scale * factor, scaling.floor, GREATEST),
            "good_streak": jnp.where(grown, 0, streak),
            "overflows": extra["overflows"] + (~good & ~bad),
        }
    return more | {
        "skipped": extra["skipped"] + bad,
        "bad_streak": jnp.where(bad, extra["bad_streak"] + 1, 0),
    }
