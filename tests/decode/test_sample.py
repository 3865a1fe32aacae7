from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import cache, leaves
from jaxllm import params as trees
from jaxllm.decode import sample
from jaxllm.decode.rules import Sampling
from jaxllm.decode.sample import generate, prepare
from jaxllm.models.presets import PRESETS, toy
from jaxllm.records import Inputs, inputs
from jaxllm.runtime import Runtime
from jaxllm.transformer import forward, logits, transformer_params

RUNTIME = Runtime()
PROMPTS = [[5, 17, 3, 42, 8, 1, 9, 77], [11, 2], [90, 4, 4, 31, 6], [50]]


COVERING = [
    "llama32_1b",
    "gpt2_small",
    "gemma2_2b",
    "deepseek_v3",
    "bloom_560m",
    "gpt_oss_20b",
    "olmo2_7b",
    "command_r7b",
    "falcon_rw_1b",
]


@lru_cache
def model(name: str):
    """A toy spec and weights drawn by numpy, which compiles nothing; wide enough that no two tokens are near a tie."""
    spec = toy(PRESETS[name]())
    rng = np.random.default_rng(0)
    draw = trees.map_params(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), jnp.float32), transformer_params(spec))
    return spec, draw


def full_logprobs(spec, params, rows: list[list[int]]) -> np.ndarray:
    """[rows, 24, V] by one forward without a cache; what stands after a token cannot change it: the model is causal."""

    @jax.jit
    def full(tokens_BT):
        hidden = forward(params, spec, inputs(tokens_BT), RUNTIME).hidden_BTD
        return jax.nn.log_softmax(logits(params, spec, hidden, RUNTIME))

    return np.asarray(full(jnp.asarray(sample.pad(rows, 24))))


@pytest.mark.parametrize("name", COVERING)  # cached decoding of the others: tests/test_contracts.py
def test_greedy_with_a_cache_equals_full_forwards(name: str) -> None:
    """Ragged prompts in one batch, 12 steps (past every window of 5), on stacked weights; on prepared ones for some."""
    spec, params = model(name)
    for weights in (params, prepare(params, spec, RUNTIME))[: 2 if name in ("gemma2_2b", "gpt2_small") else 1]:
        got = generate(spec, weights, PROMPTS, max_new_tokens=12, runtime=RUNTIME)
        full = full_logprobs(spec, params, [p + row for p, row in zip(PROMPTS, got.ids(), strict=True)])
        for prompt, row, logprob, table in zip(PROMPTS, got.ids(), np.asarray(got.logprob_BT), full, strict=True):
            seen_by = table[len(prompt) - 1 :][:12]
            assert len(row) == 12
            np.testing.assert_allclose(logprob, seen_by[np.arange(12), row], atol=2e-5)
            np.testing.assert_allclose(logprob, seen_by.max(-1), atol=2e-5)


@pytest.mark.parametrize("name", ["gemma2_2b", "gpt2_small", "llama32_1b"])
def test_long_prompts_are_fed_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, params = model(name)
    prompts = [list(np.random.default_rng(n).integers(0, 97, n)) for n in (41, 7, 30)]
    want = generate(spec, params, prompts, max_new_tokens=6, runtime=RUNTIME)
    monkeypatch.setattr(sample, "CHUNK", 20)
    jax.clear_caches()
    got = generate(spec, params, prompts, max_new_tokens=6, runtime=RUNTIME)
    jax.clear_caches()
    assert got.ids() == want.ids()
    np.testing.assert_allclose(got.logprob_BT, want.logprob_BT, atol=2e-5)


def test_a_windowed_layer_keeps_only_its_window() -> None:
    spec, _ = model("gemma2_2b")
    (local, globl), *_ = cache.init(spec, 1, 32, jnp.float32)
    assert (local.ring, local.k.shape[3], globl.ring, globl.k.shape[3]) == (True, 5, False, 32)


@pytest.mark.parametrize("greedy", [True, False])
def test_batch_mates_are_invisible(greedy: bool) -> None:
    spec, params = model("llama32_1b")
    sampling = Sampling() if greedy else Sampling(temperature=1.3, top_k=20, top_p=0.95)
    common = {"max_new_tokens": 10, "sampling": sampling, "runtime": RUNTIME}
    seeds = [3, 1, 4, 1]
    together = generate(spec, params, PROMPTS, seeds=seeds, **common).ids()
    backwards = generate(spec, params, PROMPTS[::-1], seeds=seeds[::-1], **common).ids()
    alone = [generate(spec, params, [p], seeds=[s], **common).ids()[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert together == backwards[::-1] == alone


def test_seeds_decide() -> None:
    spec, params = model("llama32_1b")
    call = {"max_new_tokens": 16, "sampling": Sampling(temperature=1.0), "runtime": RUNTIME}
    first = generate(spec, params, [[7]] * 3, seeds=[0, 1, 0], **call).ids()
    assert first[0] == first[2] != first[1]
    assert (
        generate(spec, params, [[7]] * 3, seeds=5, **call).ids()
        == generate(spec, params, [[7]] * 3, seeds=[5, 6, 7], **call).ids()
    )


def test_samples_follow_the_models_distribution() -> None:
    spec, params = model("llama32_1b")
    hidden = forward(params, spec, inputs(jnp.int32([[7, 8]])), RUNTIME).hidden_BTD
    want = np.asarray(jax.nn.softmax(2.0 * logits(params, spec, hidden, RUNTIME)[0, -1]))  # temperature 0.5
    got = generate(spec, params, [[7, 8]] * 4096, max_new_tokens=1, sampling=Sampling(temperature=0.5), runtime=RUNTIME)
    counts = np.bincount(np.asarray(got.tokens_BT[:, 0]), minlength=spec.vocab)
    chi2 = (((counts - 4096 * want) ** 2) / (4096 * want)).sum()
    assert chi2 < 97 + 5 * (2 * 97) ** 0.5


def test_rows_end_at_any_eos_and_the_loop_ends_with_the_last_row() -> None:
    spec, params = model("llama32_1b")
    free = generate(spec, params, PROMPTS, max_new_tokens=12, runtime=RUNTIME)
    eos = [free.ids()[0][3], free.ids()[1][0]]
    got = generate(spec, params, PROMPTS, max_new_tokens=12, eos=eos, runtime=RUNTIME)
    for cut, whole in zip(got.ids(), free.ids(), strict=True):
        ends = [i for i, t in enumerate(whole) if t in eos]
        assert cut == whole[: ends[0] + 1 if ends else 12]
    past_end = np.arange(12) >= np.asarray(got.length_B)[:, None]
    assert (np.asarray(got.tokens_BT)[past_end] == 0).all() and (np.asarray(got.logprob_BT)[past_end] == 0).all()


def test_early_exit_takes_no_step_more_than_the_longest_row() -> None:
    spec, params = model("llama32_1b")
    first = [row[0] for row in generate(spec, params, PROMPTS, max_new_tokens=1, runtime=RUNTIME).ids()]
    program = sample.Program(spec, RUNTIME, Sampling(), (), 32)
    state = sample.begin(program, params, None, *sample._start(program, PROMPTS, 16, 0, 5))
    ended = replace(program, eos=tuple(first))
    assert bool(sample.begin(ended, params, None, *sample._start(ended, PROMPTS, 16, 0, 5)).done_B.all())
    # cached_B counts forwards whose rows were kept: with a limit of 5, 3 after the prompt's (the last ends the row).
    assert (sample.advance(program, params, state, 100).cached_B - state.cached_B).tolist() == [3, 3, 3, 3]
    assert (sample.advance(program, params, state, 2).past.length_B - state.past.length_B).tolist() == [2, 2, 2, 2]


def test_calls_of_like_size_share_a_compilation() -> None:
    spec, params = model("gpt2_small")
    jax.clear_caches()
    for prompt, new in (([1] * 20, 4), ([2] * 17, 7), ([3] * 19, 5)):
        generate(spec, params, [prompt], max_new_tokens=new, runtime=RUNTIME)
    assert sample._generate._cache_size() == 1


def test_bfloat16() -> None:
    spec, params = model("llama32_1b")
    runtime = Runtime(compute_dtype="bfloat16")
    plain = generate(spec, params, PROMPTS, max_new_tokens=4, runtime=runtime)
    ready = generate(spec, prepare(params, spec, runtime), PROMPTS, max_new_tokens=4, runtime=runtime)
    want = generate(spec, params, PROMPTS, max_new_tokens=4, runtime=RUNTIME)
    np.testing.assert_allclose(plain.logprob_BT[:, 0], want.logprob_BT[:, 0], atol=0.05)
    np.testing.assert_allclose(ready.logprob_BT[:, 0], want.logprob_BT[:, 0], atol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("equation", "shape", "split"),
    [
        ("BTD,DNH->BTNH", (8, 3, 4), 1),
        ("BTNH,NHD->BTD", (3, 4, 8), 2),
        ("BTD,DF->BTF", (8, 5), 1),
        ("BTD,VD->BTV", (7, 8), 1),
    ],
)
def test_a_matrix_is_its_weight(equation: str, shape: tuple[int, ...], split: int, rows: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=shape), dtype)
    x_shape = {"BTNH": (rows, 1, 3, 4), "BTD": (rows, 1, 8)}[equation.split(",", maxsplit=1)[0]]
    x = jnp.asarray(rng.normal(size=x_shape), dtype)
    flat = leaves.matrix(w, split)
    tolerance = 1e-5 if dtype == "float32" else 0.02
    got, want = leaves.project(x, flat, equation), leaves.project(x, w, equation)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    np.testing.assert_allclose(np.float32(got), np.float32(want), atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(leaves.dense(flat, w.dtype), w)


# ----------------------------------------------------------------------------------------------- cache verbs


@pytest.mark.parametrize("name", ["llama32_1b", "gemma2_2b"])
def test_rejected_rows_leave_no_trace(name: str) -> None:
    """Of 4 tokens fed at once 2 are accepted; what follows is as if only those had been fed (a ring has live rows)."""
    spec, params = model(name)
    program = sample.Program(spec, RUNTIME, Sampling(), (), 24)

    def feed(caches, tokens, start, count):
        part = sample.Feed(jnp.int32([tokens]), jnp.int32([start]), jnp.int32([len(tokens)]))
        hidden, out = sample.run(program, params, caches, part)
        return hidden, cache.commit(caches, out.rows, part.start_B, jnp.int32([count]))

    prompt = list(range(1, 10))
    _, filled = feed(sample.empty(program, 1), prompt, 0, 9)
    _, some = feed(filled, [20, 21, 66, 67], 9, 2)
    _, only = feed(filled, [20, 21], 9, 2)
    got, _ = feed(some, [30, 31], 11, 2)
    want, _ = feed(only, [30, 31], 11, 2)
    np.testing.assert_allclose(got, want, atol=1e-5)
    full = forward(params, spec, inputs(jnp.int32([[*prompt, 20, 21, 30, 31]])), RUNTIME).hidden_BTD[:, -1]
    np.testing.assert_allclose(got, full, atol=1e-4)


def test_reorder_moves_rows() -> None:
    spec, params = model("gemma2_2b")
    program = sample.Program(spec, RUNTIME, Sampling(), (), 24)
    state = sample.begin(program, params, None, *sample._start(program, PROMPTS, 16, 0, 4))
    index_B = jnp.int32([2, 2, 0, 3])
    token = sample.Feed(jnp.full((4, 1), 5), state.cached_B, jnp.ones(4, jnp.int32))
    want, _ = sample.run(program, params, state.caches, token)
    moved = sample.Feed(token.new_BT, token.start_B[index_B], token.count_B)
    got, _ = sample.run(program, params, cache.reorder(state.caches, index_B), moved)
    np.testing.assert_allclose(got, want[index_B], atol=1e-5)


def test_the_loop_updates_the_cache_in_place() -> None:
    """Temporary memory stays far below one cache, so no step copies it, nor reads it through slices."""
    plain, params = model("llama32_1b")
    spec, ready = sample.layered(plain, prepare(params, plain, RUNTIME))
    program = sample.Program(spec, RUNTIME, Sampling(), (), 4096)
    args = jax.tree.map(jnp.asarray, sample._start(program, PROMPTS, 16, 0, 4))
    state = jax.eval_shape(lambda: sample.begin(program, ready, None, *args))
    loop = jax.jit(sample.advance, static_argnums=0, donate_argnums=2).lower(program, ready, state, 9).compile()
    memory = loop.memory_analysis()
    assert memory.alias_size_in_bytes > cache.nbytes(state.caches)
    assert memory.temp_size_in_bytes < cache.nbytes(state.caches) * 0.3


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, 97]], {}, "ids 1..97"),
        ([[-1]], {}, "ids -1..-1"),
        ([[1] * 60], {"max_new_tokens": 5}, "context of 64"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([], {}, "wants prompts"),
        ([[1], [2]], {"seeds": [1]}, "one seed per prompt"),
    ],
)
def test_bad_input_is_named_before_work(prompts, more, message: str) -> None:
    spec, params = model("llama32_1b")
    with pytest.raises(ValueError, match=message):
        generate(spec, params, prompts, **({"max_new_tokens": 2} | more))


def test_bucket_is_tight_and_monotone() -> None:
    sizes = [sample.bucket(n) for n in range(1, 5000)]
    assert all(n <= s <= max(16, 1.5 * n) for n, s in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert sample.bucket(512) == 512 and sample.bucket(513) == 768


def test_a_layer_of_inputs_without_segments_still_decodes() -> None:
    spec, params = model("gpt2_small")
    caches = cache.init(spec, 1, 8, jnp.float32)
    slot = jnp.int32([[0]])
    out = forward(params, spec, Inputs(jnp.int32([[3]]), slot, slot_BT=slot), RUNTIME, caches)
    want = forward(params, spec, inputs(jnp.int32([[3]])), RUNTIME)
    np.testing.assert_allclose(out.hidden_BTD, want.hidden_BTD, atol=1e-5)
