"""Look at a packed batch: each segment in a colour, text without loss dimmed, what a row is made of beside it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.records import Batch

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")


def row_panel(batch: Batch, row: int, tokenizer: Tokenizer, channels: Sequence[str]) -> Panel:
    """One row of a batch [B, T]: its tokens coloured by segment, dim where `weight_BT` is 0, "·" for padding."""
    segment_T, weight_T = np.asarray(batch.segment_BT[row]), np.asarray(batch.weight_BT[row])
    text = Text()
    for start, end in _runs(segment_T, weight_T):
        ids = np.asarray(batch.tokens_BT[row, start:end]).tolist()
        segment = int(segment_T[start])
        shown = tokenizer.decode(ids, skip_special=False) if segment else "·" * (end - start)
        text.append(shown, style=_style(segment, float(weight_T[start])))
    return Panel(text, title=_title(batch, row, channels), title_align="left")


def show_batch(batch: Batch, tokenizer: Tokenizer, channels: Sequence[str], console: Console | None = None) -> None:
    """Print every row of a batch [B, T] in colour."""
    console = console or Console()
    for row in range(batch.tokens_BT.shape[0]):
        console.print(row_panel(batch, row, tokenizer, channels))


def _runs(segment_T: np.ndarray, weight_T: np.ndarray) -> list[tuple[int, int]]:
    """Half-open stretches [start, end) of the row in which segment and loss do not change."""
    change = (np.diff(segment_T) != 0) | (np.diff(weight_T > 0) != 0)
    edges = [0, *(np.flatnonzero(change) + 1).tolist(), len(segment_T)]
    return list(itertools.pairwise(edges))


def _style(segment: int, weight: float) -> str:
    if segment == 0:
        return "bright_black"
    colour = _COLOURS[(segment - 1) % len(_COLOURS)]
    return colour if weight > 0 else f"dim {colour}"


def _title(batch: Batch, row: int, channels: Sequence[str]) -> str:
    """Segment sizes with their channels, and how many tokens carry loss."""
    segment_T, channel_T = np.asarray(batch.segment_BT[row]), np.asarray(batch.channel_BT[row])
    parts = []
    for segment in sorted(set(segment_T.tolist()) - {0}):
        here = segment_T == segment
        parts.append(f"{segment}: {channels[int(channel_T[here][0])]} {int(here.sum())}")
    weighted = int((np.asarray(batch.weight_BT[row]) > 0).sum())
    return f"row {row} | {', '.join(parts) or 'padding only'} | loss on {weighted} of {len(segment_T)}"
