"""The block logic against the dense mask."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import config
from jaxllm.kernels.pattern import Kind, allowed, block_kind, block_lists, kinds
from tests.kernels.oracle import meets

atoms = st.one_of(st.just(config.Full()), st.just(config.Causal()), st.builds(config.Local, st.integers(1, 40)))
patterns = st.recursive(atoms, lambda p: st.builds(config.And, p, p) | st.builds(config.Or, p, p), max_leaves=4)


def table(pattern, T, S):
    return np.array([[meets(pattern, q, k) for k in range(S)] for q in range(T)])


@settings(max_examples=60, deadline=None)
@given(patterns, st.integers(1, 40), st.integers(1, 40))
def test_allowed_is_the_definition(pattern, T, S):
    got = np.broadcast_to(allowed(pattern, np.arange(T)[:, None], np.arange(S)[None]), (T, S))
    np.testing.assert_array_equal(got, table(pattern, T, S))


@settings(max_examples=100, deadline=None)
@given(patterns, st.integers(1, 60), st.integers(1, 60), st.integers(1, 17), st.integers(1, 17))
def test_kinds_never_lie(pattern, T, S, block_q, block_k):
    dense = table(pattern, T, S)
    for (i, j), kind in np.ndenumerate(kinds(pattern, T, S, block_q, block_k)):
        block = dense[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        assert kind != Kind.EMPTY or not block.any()
        assert kind != Kind.FULL or (block.all() and (j + 1) * block_k <= S)


@settings(max_examples=60, deadline=None)
@given(atoms, st.integers(0, 50), st.integers(1, 20), st.integers(0, 50), st.integers(1, 20))
def test_single_patterns_are_exact(pattern, q_lo, q_len, k_lo, k_len):
    q_hi, k_hi = q_lo + q_len, k_lo + k_len
    block = [meets(pattern, q, k) for q in range(q_lo, q_hi) for k in range(k_lo, k_hi)]
    assert block_kind(pattern, q_lo, q_hi, k_lo, k_hi) == int(any(block)) + int(all(block))


def test_a_window_costs_what_it_sees():
    blocks = block_lists(config.Causal() & config.Local(1024), 131_072, 131_072, 512, 512)
    assert len(blocks.q) == 3 * 256 - 3
    assert (blocks.only(Kind.FULL).q - blocks.only(Kind.FULL).k == 1).all()
