"""What a run writes down: metrics.jsonl always, TensorBoard events when installed, a PNG of the curves.

metrics.jsonl has one object per line: {"step": 10, "train/loss": 4.2, "train/loss/comedy": 4.3, ...}. A resumed run
first drops the lines past its checkpoint, so that every step stands there once.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
from etils import epath

from jaxllm.data.files import write_atomic


class MetricsWriter:
    """Appends records to metrics.jsonl, and to TensorBoard events when tensorboardX is installed.

    active: False on all processes but one, where nothing is written.
    """

    def __init__(self, run_dir: epath.Path, resume_step: int, active: bool = True) -> None:
        self._path, self._active = run_dir / "metrics.jsonl", active
        self._events = _event_writer(run_dir, resume_step) if active else None
        self._lines = (
            [json.dumps(r) + "\n" for r in read_metrics(run_dir) if r["step"] <= resume_step] if active else []
        )
        if active:
            self._rewrite()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line at `step`, on disk when this returns."""
        if not self._active:
            return
        self._lines.append(json.dumps({"step": step} | dict(values)) + "\n")
        if "://" in str(self._path):  # object stores cannot append
            self._rewrite()
        else:
            with self._path.open("a") as file:
                file.write(self._lines[-1])
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def _rewrite(self) -> None:
        write_atomic(self._path, "".join(self._lines).encode())

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._events.close()


def _event_writer(run_dir: epath.Path, step: int) -> Any:
    try:
        board = importlib.import_module("tensorboardX")
    except ImportError:
        return None
    return board.SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)


def read_metrics(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    path = epath.Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def utilisation(m: Mapping[str, Any]) -> dict[str, float]:
    """The routers' loss, and the loads of the busiest and the idlest expert of any layer: 1 is an equal share."""
    load_LE = np.asarray(m["expert_load"])
    share_LE = load_LE / np.maximum(load_LE.mean(-1, keepdims=True), 1e-9)
    return {
        "train/router_loss": float(m["router_loss"]) / max(float(m["weight"]), 1e-9),
        "train/experts/load_max": float(share_LE.max()),
        "train/experts/load_min": float(share_LE.min()),
    }


def by_channel(names: Iterable[str], nll: Iterable[float], weight: Iterable[float], prefix: str) -> dict[str, float]:
    """{"<prefix>/<channel>": mean nats per token} of the channels that were present."""
    triples = zip(names, nll, weight, strict=True)
    return {f"{prefix}/{name}": float(total / w) for name, total, w in triples if w > 0}


def plot(run_dir: epath.PathLike) -> epath.Path | None:
    """Draw losses.png: training and validation loss, in all and by channel, over steps. None without matplotlib."""
    try:
        figure = importlib.import_module("matplotlib.figure")
    except ImportError:
        return None
    records = read_metrics(run_dir)
    fig = figure.Figure(figsize=(10, 4.2), layout="constrained")
    total, channels = fig.subplots(1, 2, sharey=True)
    _curve(total, records, "train/loss", "train", smooth=True)
    _curve(total, records, "val/loss", "validation", marker="o")
    total.set(title="loss", xlabel="step", ylabel="nats per token")
    names = sorted({key for r in records for key in r if key.startswith("train/loss/")})
    for name in names:
        _curve(channels, records, name, name.removeprefix("train/loss/"), smooth=True)
    channels.set(title="training loss by channel", xlabel="step")
    for axes in (total, channels):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    path, png = epath.Path(run_dir) / "losses.png", io.BytesIO()
    fig.savefig(png, dpi=130, format="png")
    write_atomic(path, png.getvalue())
    return path


def _curve(
    axes: Any, records: list[dict[str, Any]], key: str, label: str, smooth: bool = False, marker: str = ""
) -> None:
    """One line; with `smooth` an exponential mean over a few of the points, the raw values faint behind it."""
    points = [(r["step"], r[key]) for r in records if key in r]
    if not points:
        return
    x, y = zip(*points, strict=True)
    if smooth:
        mean, means, rate = y[0], [], 1 / max(1, len(y) // 40)
        for value in y:
            mean += rate * (value - mean)
            means.append(mean)
        (line,) = axes.plot(x, means, label=label, linewidth=1.5)
        axes.plot(x, y, color=line.get_color(), alpha=0.2, linewidth=0.8)
    else:
        axes.plot(x, y, label=label, marker=marker, linewidth=1.5)
