import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.corpus import Document
from jaxllm.data.packing import BestFit, NextFit, Packing, plan_rows, prepare_plan
from jaxllm.data.shards import prepare_shards
from jaxllm.data.source import Finite, Source, prepare

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(lambda lengths: max(lengths) > 1)
FIT = st.sampled_from([NextFit(), BestFit(), BestFit(window=3), BestFit(window=1)])
slow = settings(deadline=None, max_examples=150)


def pieces(plan):
    return [(row, *piece) for row in range(plan.rows) for piece in plan.pieces(row).tolist()]


@slow
@given(lengths=LENGTHS, fit=FIT, context=st.integers(1, 17))
def test_every_prediction_exactly_once(lengths, fit, context):
    plan = plan_rows(lengths, Packing(context, fit))
    seen = sorted((d, i) for _, d, start, n in pieces(plan) for i in range(start, start + n))
    assert seen == [(d, i) for d, length in enumerate(lengths) for i in range(length - 1)]


@slow
@given(lengths=LENGTHS, fit=FIT, context=st.integers(1, 17), long=st.sampled_from(["split", "truncate"]))
def test_rows_are_full_enough_and_counted(lengths, fit, context, long):
    plan = plan_rows(lengths, Packing(context, fit, long))
    used = np.zeros(plan.rows, int)
    for row, _, _, n in pieces(plan):
        assert n >= 1
        used[row] += n
    assert used.min() >= 1
    assert used.max() <= context
    wanted = sum(max(length - 1, 0) for length in lengths)
    assert plan.counts["predictions"] + plan.counts["dropped"] == wanted
    assert plan.counts["padding"] == plan.rows * context - used.sum()
    over = sum(length - 1 > context for length in lengths)
    assert (plan.counts["split"], plan.counts["truncated"]) == ((over, 0) if long == "split" else (0, over))
    assert plan.counts["unpredictable"] == sum(length < 2 for length in lengths)
    if long == "truncate":
        assert all(start == 0 for _, _, start, _ in pieces(plan))


@slow
@given(lengths=LENGTHS, context=st.integers(1, 17))
def test_best_fit_leaves_no_two_rows_that_would_fit_in_one(lengths, context):
    plan = plan_rows(lengths, Packing(context, BestFit(window=10_000)))
    used = sorted(int(plan.pieces(row)[:, 2].sum()) for row in range(plan.rows))
    assert len(used) < 2 or used[0] + used[1] > context


def test_next_fit_keeps_the_order():
    plan = plan_rows([4, 4, 9, 2, 3], Packing(6, NextFit()))
    assert [(row, d, s, n) for row, d, s, n in pieces(plan)] == [
        (0, 0, 0, 3), (0, 1, 0, 3), (1, 2, 0, 6), (2, 2, 6, 2), (2, 3, 0, 1), (2, 4, 0, 2),
    ]  # fmt: skip


def test_a_document_a_thousand_rows_long():
    plan = plan_rows([100_000], Packing(100))
    assert (plan.rows, plan.counts["padding"]) == (1000, 1)


def test_bad_packing():
    with pytest.raises(ValueError, match="context=0 must be at least 1"):
        Packing(0)
    with pytest.raises((ValueError, TypeError), match="wrap"):  # under run-time type checks the latter
        Packing(8, long="wrap")
    with pytest.raises(ValueError, match="window=0"):
        BestFit(0)
    with pytest.raises(ValueError, match="none of 2"):
        plan_rows([0, 1], Packing(8))


# ----------------------------------------------------------------------------------------------------------- arrays

DOCUMENTS = [Document("the king and the queen " * (i + 1), "prose" if i % 3 else "verse") for i in range(12)]


@pytest.fixture
def source(tmp_path, bpe):
    return prepare("plays", DOCUMENTS, bpe, tmp_path / "s", Packing(48))


def test_arrays_hold_the_documents(source, bpe):
    batch = source.batch(range(source.rows))
    first, rest = [], []
    for row in range(source.rows):
        segments = batch.segment_BT[row]
        assert set(segments[segments > 0]) == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            assert np.array_equal(batch.position_BT[row, here], np.arange(len(here)))
            assert np.array_equal(batch.tokens_BT[row, here[1:]], batch.target_BT[row, here[:-1]])
            assert len(set(batch.channel_BT[row, here])) == 1
            first.append(batch.tokens_BT[row, here[0]])
            rest.append(batch.target_BT[row, here])
    assert np.array_equal(batch.weight_BT, (batch.segment_BT > 0).astype(np.float32))
    assert not batch.tokens_BT[batch.segment_BT == 0].any()
    stream = np.concatenate([source.shards.read(d, 0, int(n)) for d, n in enumerate(np.diff(source.shards.offsets))])
    without_first = np.delete(stream, source.shards.offsets[:-1])
    assert np.array_equal(np.sort(np.concatenate(rest)), np.sort(without_first))
    assert (np.concatenate(rest) == bpe.eos).sum() == len(DOCUMENTS)
    assert batch.tokens_BT.dtype == batch.target_BT.dtype == np.int32


def test_each_token_keeps_its_channel(source):
    batch = source.batch(range(source.rows))
    for i, name in enumerate(source.channels):
        counts = source.shards.manifest["counts"][name]
        assert batch.weight_BT[batch.channel_BT == i].sum() == counts["tokens"] - counts["documents"]


def test_wider_channels(source):
    wide = source.with_channels(["a", "prose", "verse"])
    mine, theirs = source.batch([0]), wide.batch([0])
    real = mine.segment_BT > 0
    assert np.array_equal(mine.channel_BT[real] + 1, theirs.channel_BT[real])
    with pytest.raises(ValueError, match=r"channels \['verse'\] are not among"):
        source.with_channels(["prose"])


def test_a_finite_source_is_read_once_in_order(source):
    finite = Finite(source, 4)
    batches = [finite[i] for i in range(len(finite))]
    whole = source.batch(range(source.rows))
    assert {batch.tokens_BT.shape for batch in batches} == {(4, 48)}
    assert np.array_equal(np.concatenate([batch.tokens_BT for batch in batches])[: source.rows], whole.tokens_BT)
    assert sum(batch.weight_BT.sum() for batch in batches) == source.plan.counts["predictions"]
    with pytest.raises(IndexError, match="batch 99 must be in"):
        finite[99]


def test_a_plan_is_kept_and_found_again(tmp_path, bpe):
    shards = prepare_shards(DOCUMENTS, bpe, tmp_path / "s")
    lines = []
    first = prepare_plan(shards, Packing(16), lines.append)
    (folder,) = (tmp_path / "s").glob("rows-16-*")
    before = (folder / "pieces.npy").stat().st_mtime_ns
    again = prepare_plan(shards, Packing(16), lines.append)
    assert (folder / "pieces.npy").stat().st_mtime_ns == before
    assert isinstance(again.pieces_P3, np.memmap)
    assert np.array_equal(first.pieces_P3, again.pieces_P3)
    assert "11 documents split" in lines[0]  # the shortest fits a row
    prepare_plan(shards, Packing(16, NextFit()))
    assert len(list((tmp_path / "s").glob("rows-16-*"))) == 2
    np.save(folder / "starts.npy", np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="delete that directory"):
        prepare_plan(shards, Packing(16))


def test_prepare_reuses_what_is_there(tmp_path, bpe, source):
    again = prepare("plays", DOCUMENTS, bpe, tmp_path / "s", Packing(48))
    assert isinstance(again, Source)
    assert np.array_equal(again.batch([1]).tokens_BT, source.batch([1]).tokens_BT)
