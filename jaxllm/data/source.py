"""Rows as arrays: a packed corpus that can be asked for any row, in any order, by any process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from etils import epath
from jaxtyping import Int

from jaxllm.data.corpus import Document
from jaxllm.data.packing import Packing, Plan, prepare_plan
from jaxllm.data.shards import Progress, Shards, prepare_shards
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.records import Batch


@dataclass(frozen=True)
class Source:
    """Shards with a row plan. `channels` are the names that `channel_BT` of its batches counts.

    They are the shards' own, unless `with_channels` gave a wider list (a mixture's, a training run's).
    """

    name: str
    shards: Shards
    plan: Plan
    channels: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Rows per epoch."""
        return self.plan.rows

    @property
    def context(self) -> int:
        """Tokens per row."""
        return self.plan.packing.context

    def with_channels(self, channels: Sequence[str]) -> Source:
        """The same rows, channels numbered by `channels`. ValueError when one of its own is missing there."""
        if missing := sorted(set(self.shards.channels) - set(channels)):
            raise ValueError(
                f"source {self.name}: channels {missing} are not among {list(channels)}; "
                "rename them in the corpus, or add documents of them to the training data"
            )
        return replace(self, channels=tuple(channels))

    def batch(self, rows: Sequence[int] | Int[np.ndarray, " B"]) -> Batch:
        """Numpy arrays [B, T] of the given rows. A row of -1 is all padding (the rest of a last validation batch)."""
        batch = empty_batch(len(rows), self.context)
        for b, row in enumerate(rows):
            if row >= 0:
                self._fill(batch, b, int(row))
        return batch

    def _fill(self, batch: Batch, b: int, row: int) -> None:
        """Write one row; segments count from 1, positions restart in each."""
        at = 0
        for segment, (document, start, length) in enumerate(self.plan.pieces(row).tolist(), 1):
            here = slice(at, at + length)
            window = self.shards.read(document, start, length + 1)
            batch.tokens_BT[b, here] = window[:-1]
            batch.target_BT[b, here] = window[1:]
            batch.weight_BT[b, here] = 1.0
            batch.segment_BT[b, here] = segment
            batch.position_BT[b, here] = np.arange(length)
            batch.channel_BT[b, here] = self.channels.index(self.shards.channels[self.shards.channel_ids[document]])
            at += length


def empty_batch(size: int, context: int) -> Batch:
    """A batch [B, T] of padding: all zeros, numpy."""
    ints = [np.zeros((size, context), np.int32) for _ in range(5)]
    tokens_BT, target_BT, segment_BT, position_BT, channel_BT = ints
    weight_BT = np.zeros((size, context), np.float32)
    return Batch(tokens_BT, target_BT, weight_BT, segment_BT, position_BT, channel_BT)  # type: ignore[arg-type]


def prepare(
    name: str,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: epath.PathLike,
    packing: Packing,
    *,
    workers: int = 1,
    progress: Progress = lambda line: None,
) -> Source:
    """Documents to a source in one call: tokenise into `out` (or reuse what is there) and plan rows."""
    shards = prepare_shards(documents, tokenizer, out, workers=workers, progress=progress)
    return Source(name, shards, prepare_plan(shards, packing, progress), shards.channels)


@dataclass(frozen=True)
class Finite:
    """A source read once, in order, in batches of one static size: validation.

        for i in range(len(finite)): batch = finite[i]

    The last batch is filled up with rows of weight 0.
    """

    source: Source
    batch_size: int

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(self.source.rows / self.batch_size)

    def rows(self, i: int) -> Int[np.ndarray, " B"]:
        """Row numbers of batch i, -1 past the end. IndexError outside 0..len - 1."""
        if not 0 <= i < len(self):
            raise IndexError(f"Finite: batch {i} must be in 0..{len(self) - 1}")
        rows = np.arange(i * self.batch_size, (i + 1) * self.batch_size)
        return np.where(rows < self.source.rows, rows, -1)

    def __getitem__(self, i: int) -> Batch:
        """Batch i, whole; a process that needs only part takes `source.batch(rows(i)[part])`."""
        return self.source.batch(self.rows(i))
