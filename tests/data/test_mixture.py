import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.corpus import Document
from jaxllm.data.mixture import Mixture, Stage, _pattern, _shares, batch_at, epochs_at, permute, rows_at, single
from jaxllm.data.packing import Packing
from jaxllm.data.source import prepare

quick = settings(deadline=None, max_examples=60)


@quick
@given(size=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**63), st.integers(0, 9), st.integers(0, 9)))
def test_permute_is_a_bijection(size, key):
    out = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(out), np.arange(size))


def test_permute_of_a_huge_range_stays_inside():
    size = (1 << 40) + 7
    index = np.arange(size - 1000, size)
    out = permute(index, size, (1,))
    assert len(set(out.tolist())) == 1000
    assert 0 <= out.min() <= out.max() < size
    assert abs(out.mean() / size - 0.5) < 0.05


def test_permute_looks_like_a_shuffle():
    size = 4096
    out = permute(np.arange(size), size, (3, 1, 4))
    other = permute(np.arange(size), size, (3, 1, 5))
    assert (out == np.arange(size)).sum() < 8  # one expected
    assert (out == other).sum() < 8
    assert abs(np.corrcoef(np.arange(size), out)[0, 1]) < 0.06  # four standard deviations
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.06
    parity = np.corrcoef(np.arange(size) & 1, out & 1)[0, 1]
    assert abs(parity) < 0.06


def test_permute_never_changes():
    """Resumed runs rely on these numbers."""
    assert permute(np.arange(10), 10, (0, 0, 0)).tolist() == [7, 1, 9, 4, 8, 0, 3, 6, 5, 2]


WEIGHTS = st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.0, 7.0, 1 / 3, 0.123456]), min_size=1, max_size=5).filter(any)


@settings(deadline=None, max_examples=30)
@given(weights=WEIGHTS)
def test_shares_are_exact_within_one_at_every_prefix(weights):
    pattern, shares = _pattern(weights), np.array(_shares(weights))
    n = np.arange(len(pattern.before_MS))[:, None]
    assert np.abs(pattern.before_MS - n * shares / shares.sum()).max() < 1
    assert np.abs(shares / shares.sum() - np.array(weights) / sum(weights)).max() <= 1 / (1 << 14)


def test_small_fractions_are_exact():
    assert _shares([0.7, 0.3]) == [7, 3]
    assert _shares([1 / 3, 2 / 3]) == [1, 2]
    assert _shares([50.0, 30.0, 20.0, 0.0]) == [5, 3, 2, 0]
    assert sum(_shares([2**0.5, 3**0.5])) == 1 << 14


# ---------------------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def sources(tmp_path_factory, bpe):
    folder = tmp_path_factory.mktemp("sources")

    def make(name, count, channel):
        documents = [Document(f"{name} {i} speaks of the king " * (2 + i % 5), channel) for i in range(count)]
        return prepare(name, documents, bpe, folder / name, Packing(24))

    return (make("big", 40, "prose"), make("small", 7, "verse"))


@pytest.fixture
def mixture(sources):
    return Mixture(sources, (Stage(0, 4, (3.0, 1.0)), Stage(5, 8, (1.0, 1.0)), Stage(9, 8, (0.0, 1.0))), seed=7)


def test_an_epoch_is_every_row_once(sources):
    big = sources[0]
    run = single(big, batch=3, seed=1)
    rows = np.concatenate([rows_at(run, step)[1] for step in range(2 * big.rows)])[: 6 * big.rows]
    epochs = rows.reshape(6, big.rows)
    assert all(np.array_equal(np.sort(epoch), np.arange(big.rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6
    other = np.concatenate([rows_at(replace(run, seed=2), step)[1] for step in range(big.rows)])
    assert not np.array_equal(other, rows[: 3 * big.rows])


def test_stages_carry_on_where_the_last_one_stopped(mixture):
    taken = [[], []]
    for step in range(30):
        source, row = rows_at(mixture, step)
        assert len(row) == mixture.batch_size(step) == (4 if step < 5 else 8)
        for s in (0, 1):
            taken[s] += row[source == s].tolist()
    assert (len(taken[0]), len(taken[1])) == (15 + 16, 5 + 16 + 8 * 21)
    for s, source in enumerate(mixture.sources):
        whole = len(taken[s]) // source.rows
        for epoch in range(whole):
            part = taken[s][epoch * source.rows : (epoch + 1) * source.rows]
            assert sorted(part) == list(range(source.rows))
        assert len(set(taken[s][whole * source.rows :])) == len(taken[s]) - whole * source.rows
    expected = {source.name: len(t) / source.rows for source, t in zip(mixture.sources, taken, strict=True)}
    assert epochs_at(mixture, 30) == pytest.approx(expected)
    assert epochs_at(mixture, 0) == {"big": 0.0, "small": 0.0}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_processes_see_parts_of_one_global_batch(mixture, parts):
    for step in (6, 0, 11):  # in any order: there is no state
        size = mixture.batch_size(step)
        whole = batch_at(mixture, step)
        for p in range(parts):
            rows = slice(p * size // parts, (p + 1) * size // parts)
            local = batch_at(mixture, step, rows)
            for name in ("tokens_BT", "target_BT", "weight_BT", "segment_BT", "position_BT", "channel_BT"):
                assert np.array_equal(getattr(local, name), getattr(whole, name)[rows])


def test_a_batch_is_made_of_its_rows(mixture):
    source, row = rows_at(mixture, 6)
    batch = batch_at(mixture, 6)
    assert set(source) == {0, 1}
    for b, (s, r) in enumerate(zip(source, row, strict=True)):
        assert np.array_equal(batch.tokens_BT[b], mixture.sources[s].batch([r]).tokens_BT[0])
        real = batch.segment_BT[b] > 0
        assert set(batch.channel_BT[b][real]) == {mixture.channels.index(("prose", "verse")[s])}


def test_another_process_draws_the_same_rows():
    code = (
        "import numpy as np; from jaxllm.data.mixture import permute as p; print(p(np.arange(50), 50, (1, 2)).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(permute(np.arange(50), 50, (1, 2)).tolist())


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "must start at 0"),
        ((Stage(1, 4, (1.0, 1.0)),), r"must start at 0 and then later and later, got \[1\]"),
        ((Stage(0, 4, (1.0, 1.0)), Stage(0, 8, (1.0, 1.0))), r"got \[0, 0\]"),
        ((Stage(0, 0, (1.0, 1.0)),), "batch=0 must be at least 1"),
        ((Stage(0, 4, (1.0,)),), "1 weights for 2 sources"),
        ((Stage(0, 4, (0.0, 0.0)),), "not all 0"),
        ((Stage(0, 4, (1.0, -1.0)),), ">= 0"),
        ((Stage(0, 4, (1.0, float("nan"))),), "finite"),
    ],
)
def test_bad_stages(sources, stages, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sources, stages)


def test_bad_mixtures(sources, mixture, tmp_path, bpe):
    with pytest.raises(ValueError, match=r"one context, got \[\]"):
        Mixture((), (Stage(0, 4, ()),))
    other = prepare("other", [Document("a b c", "x")], bpe, tmp_path / "o", Packing(12))
    with pytest.raises(ValueError, match=r"got \[24, 12\]"):
        Mixture((sources[0], other), (Stage(0, 4, (1.0, 1.0)),))
    with pytest.raises(ValueError, match="below 1/16384"):
        _shares([1.0, 1e-7])
    with pytest.raises(ValueError, match="step=-1"):
        rows_at(mixture, -1)
