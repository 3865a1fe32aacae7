"""Logits rules: what may be sampled, as pairs of pure functions, and the `Sampling` that names the usual ones.

Unusual: nothing is sorted. The cut of top-k and of top-p is a *value*, found by bisecting the 2^32 float32 numbers with
one masked sum per step; the result equals that of a full sort, ties included, and costs a few passes over [B, V].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

REMOVED = -jnp.inf  # the logit of a token that may not be sampled


@struct.dataclass
class Past:
    """What a rule may look at: the tokens of each row so far, prompt and answer.

    tokens_BS: int32 [B, S], row b's first length_B[b] are real.  prompt_B: how many of them were the prompt.
    """

    tokens_BS: Int[Array, "B S"]
    length_B: Int[Array, " B"]
    prompt_B: Int[Array, " B"]


class LogitsRule(NamedTuple):
    """init(past) -> state, before the first token;  apply(logits_BV, state, past) -> (logits_BV, state), at each.

    A state is any tree of arrays with a leading B axis, so that rows can be reordered; () for nothing to keep.
    Logits are float32; -inf removes a token.
    """

    init: Callable[[Past], Any]
    apply: Callable[[Float[Array, "B V"], Any, Past], tuple[Float[Array, "B V"], Any]]


def stateless(f: Callable[[Float[Array, "B V"]], Float[Array, "B V"]]) -> LogitsRule:
    """A rule that only looks at the logits."""
    return LogitsRule(lambda past: (), lambda logits_BV, state, past: (f(logits_BV), state))


def compose(*rules: LogitsRule) -> LogitsRule:
    """One after the other, each with a state of its own."""

    def apply(logits_BV: Array, states: tuple[Any, ...], past: Past) -> tuple[Array, tuple[Any, ...]]:
        new = []
        for rule, state in zip(rules, states, strict=True):
            logits_BV, later = rule.apply(logits_BV, state, past)
            new.append(later)
        return logits_BV, tuple(new)

    return LogitsRule(lambda past: tuple(rule.init(past) for rule in rules), apply)


# ------------------------------------------------------------------------------------------------------- the rules


def temperature(t: float | Float[Array, "B 1"]) -> LogitsRule:
    """logits / t: below 1 sharper, above 1 flatter."""
    return stateless(lambda logits_BV: logits_BV / t)


def top_k(k: int) -> LogitsRule:
    """Keep the k largest (Fan et al. 2018), and all that equal the smallest of them."""

    def keep(logits_BV: Array) -> Array:
        if k >= logits_BV.shape[-1]:
            return logits_BV
        cut_B = _largest(lambda v_B: jnp.sum(logits_BV >= v_B[:, None], -1) >= k, logits_BV.shape[0])
        return jnp.where(logits_BV >= cut_B[:, None], logits_BV, REMOVED)

    return stateless(keep)


def top_p(p: float | Float[Array, " B"]) -> LogitsRule:
    """Nucleus (Holtzman et al. 2020): the fewest most likely tokens whose probability reaches p, at least one.

    Of equal logits at the edge only as many are kept as p needs, those of higher id.
    """

    def keep(logits_BV: Array) -> Array:
        prob_BV = jax.nn.softmax(logits_BV, -1)
        tail = 1.0 - p

        def below(v_B: Array) -> Array:
            return jnp.sum(jnp.where(logits_BV < v_B[:, None], prob_BV, 0.0), -1)

        top_B = jnp.max(logits_BV, -1)
        cut_B = jnp.minimum(_largest(lambda v_B: below(v_B) <= tail, logits_BV.shape[0]), top_B)
        edge_BV = logits_BV == cut_B[:, None]
        each_B = jnp.max(jnp.where(edge_BV, prob_BV, 0.0), -1)
        spare_B = jnp.floor((tail - below(cut_B)) / jnp.maximum(each_B, 1e-38))  # ties that p does not need
        spare_B = jnp.clip(spare_B, 0, jnp.sum(edge_BV, -1) - 1)
        rank_BV = jnp.cumsum(edge_BV, -1)
        kept_BV = (logits_BV > cut_B[:, None]) | (edge_BV & (rank_BV > spare_B[:, None]))
        return jnp.where(kept_BV, logits_BV, REMOVED)

    return stateless(keep)


def min_p(p: float | Float[Array, "B 1"]) -> LogitsRule:
    """Keep tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""

    def keep(logits_BV: Array) -> Array:
        top_B1 = jnp.max(logits_BV, -1, keepdims=True)
        return jnp.where(jnp.exp(logits_BV - top_B1) >= p, logits_BV, REMOVED)

    return stateless(keep)


def _largest(holds: Callable[[Float[Array, " B"]], Bool[Array, " B"]], batch: int) -> Float[Array, " B"]:
    """Per row the largest finite float32 v with holds(v), for a `holds` that is true below some v and false above.

    Bisection over float32 in their order as integers: 32 steps, exact.
    """
    limit = 0x7F7FFFFF  # the largest finite float32, as an integer

    def value(order_B: Array) -> Array:
        return jax.lax.bitcast_convert_type(jnp.where(order_B < 0, order_B ^ 0x7FFFFFFF, order_B), jnp.float32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)  # ceil of the mean, without overflow
        ok = holds(value(middle))
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    start = (jnp.full(batch, -limit - 1, jnp.int32), jnp.full(batch, limit, jnp.int32))
    return value(jax.lax.fori_loop(0, 32, halve, start)[0])


# -------------------------------------------------------------------------------------------------------- Sampling


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Greedy when `temperature` is None or 0. Hashable, a static argument.

    Rules are applied in the order of the fields, each on what the one before left; None leaves a rule out.
    Raises ValueError for a value outside its range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        t = self.temperature
        if t is not None and not (math.isfinite(t) and t >= 0):
            raise ValueError(f"Sampling: temperature={t} must be a number >= 0; None or 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Sampling: top_k={self.top_k} must be at least 1; None keeps every token")
        for name in ("top_p", "min_p"):
            p = getattr(self, name)
            if p is not None and not 0 < p <= 1:
                raise ValueError(f"Sampling: {name}={p} must be in (0, 1]; None leaves the rule out")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return not self.temperature

    @property
    def rule(self) -> LogitsRule:
        """The rules asked for, as one; greedy decoding needs none, since none of them removes the likeliest token."""
        if self.greedy:
            return compose()
        made = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        return compose(*(f(getattr(self, name)) for name, f in made.items() if getattr(self, name) is not None))


GREEDY = Sampling()
