"""What a person sees while a run goes on: one live line in a terminal, a line per log record elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """loss, tokens/s, MFU and time left. Quiet on every process but the first."""

    def __init__(self, console: Console, start: int, steps: int) -> None:
        columns = (
            TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
        )  # fmt: skip
        self._console = console
        self._live = console.is_terminal
        self._bar = Progress(*columns, console=console, speed_estimate_period=60, disable=not self._live)
        self._task = self._bar.add_task("train", total=steps, completed=start, text="compiling ...")
        self._began, self._start, self._steps = time.perf_counter(), start, steps
        self._compiled = False

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """After `step` steps: move the bar, or print a line where there is none."""
        text = f"loss {values['train/loss']:.3f}  {values['tokens_per_second']:,.0f} tok/s  mfu {values['mfu']:.1%}"
        if not self._compiled:  # the first step compiles: time left is told from the second on
            self._began, self._start, self._compiled = time.perf_counter(), step, True
        self._bar.update(self._task, completed=step, text=text)
        if not self._live:
            channels = "  ".join(
                f"{k.split('/')[-1]} {v:.3f}" for k, v in values.items() if k.startswith("train/loss/")
            )
            pace = (time.perf_counter() - self._began) / max(step - self._start, 1)
            eta = f"  eta {pace * (self._steps - step):,.0f} s" if step > self._start else ""
            self.say(f"step {step:>6}/{self._steps}  {text}{eta}  [{channels}]")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
