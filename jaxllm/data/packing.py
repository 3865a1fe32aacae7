"""Which pieces of which documents share a row: planned once, offline, and kept in a memory-mapped table.

A document of n tokens has n - 1 predictions: inputs 0..n-2, each with the next token as its target, so the last input
predicts eos and no place is spent on eos as an input. A row has `context` inputs. A document with more predictions is
cut into full rows and a rest; since the target at the cut is read from the document, not from the row, no prediction
is lost: every token of the corpus but each document's first is predicted exactly once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, assert_never

import numpy as np
from etils import epath
from jaxtyping import Int

from jaxllm.data.files import read_array, write_array, write_atomic
from jaxllm.data.shards import Progress, Shards

VERSION = 1


@dataclass(frozen=True)
class NextFit:
    """Pieces in order; a new row whenever the next piece does not fit. Keeps neighbours together, pads more."""


@dataclass(frozen=True)
class BestFit:
    """Within windows of `window` pieces, longest first, each into the fullest row that has room (best-fit decreasing).

    Memory and time stay linear in the corpus; a larger window pads less.
    """

    window: int = 16_384

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"BestFit: window={self.window} must be at least 1 piece")


Fit = NextFit | BestFit


@dataclass(frozen=True)
class Packing:
    """How documents become rows of `context` tokens. `long`: cut a document longer than a row up, or drop the rest."""

    context: int
    fit: Fit = BestFit()
    long: Literal["split", "truncate"] = "split"

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"Packing: context={self.context} must be at least 1 token")
        if self.long not in ("split", "truncate"):
            raise ValueError(f"Packing: long={self.long!r} must be 'split' or 'truncate'")


@dataclass(frozen=True)
class Plan:
    """The row table: row r is pieces_P3[starts[r]:starts[r + 1]], each (document, first input, inputs).

    counts: rows, pieces, predictions, padding (tokens), split and truncated documents, dropped predictions, and
    unpredictable documents (of a single token).
    """

    packing: Packing
    starts: Int[np.ndarray, " starts"]
    pieces_P3: Int[np.ndarray, "P 3"]
    counts: dict[str, int]

    @cached_property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    def pieces(self, row: int) -> Int[np.ndarray, "pieces 3"]:
        """int64 [pieces, 3] of one row."""
        return self.pieces_P3[self.starts[row] : self.starts[row + 1]]

    def summary(self) -> str:
        """One line for people."""
        c, places = self.counts, self.rows * self.packing.context
        return (
            f"packing: {c['documents']:,} documents in {self.rows:,} rows of {self.packing.context}, "
            f"{100 * c['padding'] / max(places, 1):.2f} % padding; {c['split']:,} documents split, "
            f"{c['truncated']:,} truncated ({c['dropped']:,} predictions dropped)"
        )


def plan_rows(lengths: Sequence[int] | Int[np.ndarray, " documents"], packing: Packing) -> Plan:
    """Plan rows for documents of `lengths` tokens. Pure. ValueError when nothing can be predicted."""
    pieces_P3, counts = _pieces(np.asarray(lengths, np.int64), packing)
    if not len(pieces_P3):
        raise ValueError(f"packing: a document needs 2 tokens to predict one, but none of {len(lengths)} has them")
    row_of, rows = _place(pieces_P3[:, 2], packing)
    order = np.argsort(row_of, kind="stable")
    starts = np.searchsorted(row_of[order], np.arange(rows + 1))
    predictions = int(pieces_P3[:, 2].sum())
    padding = rows * packing.context - predictions
    counts |= {"rows": rows, "pieces": len(pieces_P3), "predictions": predictions, "padding": padding}
    return Plan(packing, starts, pieces_P3[order], counts)


def _pieces(lengths: Int[np.ndarray, " documents"], packing: Packing) -> tuple[Int[np.ndarray, "P 3"], dict[str, int]]:
    """(document, start, inputs) of every piece, in document order, and what happened to long documents."""
    wanted, context = np.maximum(lengths - 1, 0), packing.context
    long = wanted > context
    kept = np.minimum(wanted, context) if packing.long == "truncate" else wanted
    number = -(-kept // context)
    document = np.repeat(np.arange(len(lengths)), number)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(number) - number, number)
    start = nth * context
    pieces = np.stack([document, start, np.minimum(kept[document] - start, context)], axis=1)
    over = int(long.sum())
    counts = {
        "documents": len(lengths),
        "unpredictable": int((wanted == 0).sum()),
        "split": over if packing.long == "split" else 0,
        "truncated": over if packing.long == "truncate" else 0,
        "dropped": int((wanted - kept).sum()),
    }
    return pieces, counts


def _place(lengths: Int[np.ndarray, " P"], packing: Packing) -> tuple[Int[np.ndarray, " P"], int]:
    """The row of each piece, and the number of rows."""
    match packing.fit:
        case NextFit():
            return _next_fit(lengths, packing.context)
        case BestFit(window):
            placed, rows = [], 0
            for begin in range(0, len(lengths), window):
                row_of, used = _best_fit(lengths[begin : begin + window], packing.context)
                placed.append(row_of + rows)
                rows += used
            return np.concatenate(placed), rows
        case other:
            assert_never(other)


def _next_fit(lengths: Int[np.ndarray, " P"], context: int) -> tuple[Int[np.ndarray, " P"], int]:
    row_of, row, used = np.empty(len(lengths), np.int64), 0, 0
    for i, length in enumerate(lengths.tolist()):
        if used + length > context:
            row, used = row + 1, 0
        row_of[i] = row
        used += length
    return row_of, row + 1


def _best_fit(lengths: Int[np.ndarray, " P"], context: int) -> tuple[Int[np.ndarray, " P"], int]:
    """Bit f of `free` tells whether a row with f places left exists: the tightest one is the lowest bit at or above."""
    row_of, rows, free = np.empty(len(lengths), np.int64), 0, 0
    with_room: dict[int, list[int]] = {}
    sizes = lengths.tolist()
    for i in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[i]
        fitting = free >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            free ^= 0 if with_room[room] else 1 << room
        else:
            room, row, rows = context, rows, rows + 1
        row_of[i] = row
        if left := room - size:
            with_room.setdefault(left, []).append(row)
            free |= 1 << left
    return row_of, rows


# ------------------------------------------------------------------------------------------------------- on disk


def prepare_plan(shards: Shards, packing: Packing, progress: Progress = lambda line: None) -> Plan:
    """The plan for `shards`, kept in a directory beside their tokens; made on first use, then opened.

    Raises ValueError when the directory is damaged.
    """
    key = {"version": VERSION, "packing": _describe(packing), "corpus": shards.manifest["corpus"]}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = shards.path / f"rows-{packing.context}-{name}"
    if not (folder / "plan.json").is_file():
        plan = plan_rows(np.diff(shards.offsets), packing)
        _save(plan, key, folder)
    plan = _open(folder, packing)
    progress(plan.summary())
    return plan


def _describe(packing: Packing) -> dict[str, Any]:
    return asdict(packing) | {"fit": [type(packing.fit).__name__, asdict(packing.fit)]}


def _save(plan: Plan, key: dict[str, Any], folder: epath.Path) -> None:
    """Arrays first, the small file that makes them count last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_array(folder / "starts.npy", plan.starts)
    write_array(folder / "pieces.npy", plan.pieces_P3)
    write_atomic(folder / "plan.json", json.dumps(key | {"counts": plan.counts}, indent=1).encode())


def _open(folder: epath.Path, packing: Packing) -> Plan:
    counts = json.loads((folder / "plan.json").read_text())["counts"]
    plan = Plan(packing, read_array(folder / "starts.npy"), read_array(folder / "pieces.npy"), counts)
    if plan.rows != counts["rows"] or len(plan.pieces_P3) != counts["pieces"]:
        raise ValueError(
            f"{folder}: holds {plan.rows} rows where plan.json says {counts['rows']}; delete that directory"
        )
    return plan
