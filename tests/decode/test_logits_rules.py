from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.decode import rules
from jaxllm.decode.rules import LogitsRule, Past, Sampling

GOLDEN = np.load(Path(__file__).parent.parent / "goldens/decoding/rules.npz")


def run(rule: LogitsRule, logits: np.ndarray) -> np.ndarray:
    past = Past(
        jnp.zeros((len(logits), 1), jnp.int32), jnp.zeros(len(logits), jnp.int32), jnp.zeros(len(logits), jnp.int32)
    )
    return np.asarray(jax.jit(rule.apply)(jnp.asarray(logits), rule.init(past), past)[0])


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("temperature_0_7", rules.temperature(0.7)),
        ("top_k_10", rules.top_k(10)),
        ("top_p_0_9", rules.top_p(0.9)),
        ("top_p_0_05", rules.top_p(0.05)),
        ("min_p_0_1", rules.min_p(0.1)),
    ],
)
def test_equals_the_reference_implementation(name: str, rule: LogitsRule) -> None:
    got, want = run(rule, GOLDEN["logits"]), GOLDEN[name]
    assert (np.isfinite(got) == np.isfinite(want)).all()
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(("name", "rule"), [("top_k_2", rules.top_k(2)), ("top_p_0_5", rules.top_p(0.5))])
def test_equal_logits_at_the_edge(name: str, rule: LogitsRule) -> None:
    np.testing.assert_array_equal(run(rule, GOLDEN["ties.logits"]), GOLDEN[f"ties.{name}"])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_a_sort(p: float) -> None:
    logits = np.random.default_rng(0).normal(size=(16, 5000)).astype(np.float32) * 3
    prob = np.exp(logits.astype(np.float64))
    prob /= prob.sum(-1, keepdims=True)
    order = np.argsort(logits, -1, kind="stable")
    gone = np.cumsum(np.take_along_axis(prob, order, -1), -1) <= 1 - p
    gone[:, -1] = False
    want = logits.copy()
    np.put_along_axis(want, order, np.where(gone, -np.inf, np.take_along_axis(logits, order, -1)), -1)
    got = run(rules.top_p(p), logits)
    assert (np.isfinite(got) != np.isfinite(want)).sum() <= 1  # float32 sums may move one edge by one token
    assert (got[np.isfinite(got)] == logits[np.isfinite(got)]).all()


@pytest.mark.parametrize("k", [1, 7, 4999, 5000, 9000])
def test_top_k_equals_a_sort(k: int) -> None:
    logits = np.random.default_rng(1).normal(size=(3, 5000)).astype(np.float32)
    got = run(rules.top_k(k), logits)
    assert (np.isfinite(got).sum(-1) == min(k, 5000)).all()
    assert (np.sort(logits, -1)[:, -min(k, 5000)] == np.where(np.isfinite(got), got, np.inf).min(-1)).all()


def test_rules_after_another_that_removed_tokens() -> None:
    logits = np.float32([[3.0, -np.inf, 1.0, -np.inf, 2.0]])
    assert np.isfinite(run(rules.top_k(4), logits)).tolist() == [[True, False, True, False, True]]
    assert np.isfinite(run(rules.top_p(1.0), logits)).tolist() == [[True, False, True, False, True]]
    assert np.isfinite(run(rules.top_p(0.5), logits)).tolist() == [[True, False, False, False, False]]
    chain = Sampling(temperature=0.5, top_k=2, top_p=0.999, min_p=1e-3).rule
    np.testing.assert_array_equal(run(chain, logits), [[6.0, -np.inf, -np.inf, -np.inf, 4.0]])


def test_a_stateful_rule_composes() -> None:
    def apply(logits, state, past):
        return logits + state[:, None].astype(jnp.float32), state + 1

    counting = LogitsRule(lambda past: past.length_B, apply)
    past = Past(jnp.zeros((2, 3), jnp.int32), jnp.int32([1, 2]), jnp.int32([1, 2]))
    both = rules.compose(counting, rules.temperature(2.0))
    logits, state = both.apply(jnp.zeros((2, 4)), both.init(past), past)
    assert logits[:, 0].tolist() == [0.5, 1.0]
    assert state[0].tolist() == [2, 3]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
    ],
)
def test_a_value_out_of_range_is_named(bad: dict[str, float]) -> None:
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Sampling(**bad)


def test_temperature_zero_and_none_are_greedy() -> None:
    assert Sampling().greedy and Sampling(temperature=0.0, top_k=3).greedy and not Sampling(temperature=0.1).greedy
