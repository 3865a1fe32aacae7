"""Plans as pictures: memory by part, time by part, memory against time; PNG, or one HTML page with the figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from jaxllm.data.files import write_atomic
from jaxllm.show_mask import new_figure

Named = Sequence[tuple[str, dict[str, Any]]]
"""Plans that fit, with what to call them: `estimate.to_json` of each."""

_SECONDS = ("step_seconds", "xla_seconds", "pallas_seconds", "grouped_seconds", "wire_seconds")
_FIGURES = ("hbm_gib", *_SECONDS, "wire_gb", "mfu")


def draw(title: str, plans: Named, path: Path) -> None:
    """Write the picture of one plan or more; a path that ends in .html gets a page with it and the table of figures.

    Raises what `require_drawable` raises.
    """
    require_drawable(path)
    png = _png(title, plans)
    content = png if path.suffix == ".png" else _page(title, plans, png).encode()
    write_atomic(epath.Path(path), content)


def require_drawable(path: Path) -> None:
    """To be asked before work is done. Raises ValueError for an ending other than .png and .html or a directory that
    does not exist, OSError with the cure when matplotlib is missing.
    """
    if path.suffix not in (".png", ".html") or not path.resolve().parent.is_dir():
        raise ValueError(f"plan: a picture is a .png or .html file in a directory that exists, got {str(path)!r}")
    new_figure()


def _png(title: str, plans: Named) -> bytes:
    figure = new_figure(figsize=(15, 5))
    memory, time, pareto = figure.subplots(1, 3)
    names = [str(i + 1) for i in range(len(plans))]
    parts = [part for part in plans[0][1]["hbm_by_part"] if any(p["hbm_by_part"][part] > 0.01 for _, p in plans)]
    _bars(memory, names, {part: [p["hbm_by_part"][part] for _, p in plans] for part in parts})
    memory.axhline(plans[0][1]["hbm_limit_gib"], color="black", linestyle="--", linewidth=1)
    memory.set(title="memory per chip (GiB)", xlabel="plan")
    times = {
        "XLA": [p["xla_seconds"] for _, p in plans],
        "Pallas kernels": [p["step_seconds"] - p["xla_seconds"] - p["grouped_seconds"] for _, p in plans],
        "grouped matmuls": [p["grouped_seconds"] for _, p in plans],
    }
    _bars(time, names, times)
    time.plot(names, [p["wire_seconds"] for _, p in plans], "k_", markersize=18, label="links, beside them")
    time.legend(fontsize=7)
    time.set(title="step (s), estimated by the compiler", xlabel="plan")
    for name, (_, p) in zip(names, plans, strict=True):
        x, y = p["hbm_gib"], max(p["step_seconds"], p["wire_seconds"])
        pareto.plot(x, y, "o")
        pareto.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5))
    pareto.set(title="memory (GiB) against step (s): lower left is better", xlabel="GiB", ylabel="s")
    figure.suptitle(title)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _bars(axes: Any, names: list[str], heights: dict[str, list[float]]) -> None:
    bottom = [0.0] * len(names)
    for label, values in heights.items():
        axes.bar(names, values, bottom=bottom, label=label)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axes.legend(fontsize=7)


def _page(title: str, plans: Named, png: bytes) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("plan", "layout", *_FIGURES))
    rows = "".join(
        f"<tr><td>{i}</td><td>{html.escape(name)}</td>" + "".join(f"<td>{_shown(p[key])}</td>" for key in _FIGURES)
        + "</tr>"
        for i, (name, p) in enumerate(plans, 1)
    )  # fmt: skip
    image = base64.b64encode(png).decode()
    versions = html.escape(", ".join(f"{k} {v}" for k, v in plans[0][1]["versions"].items()))
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:15px sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:right}"
        "td:nth-child(2){text-align:left}img{max-width:100%}</style>"
        f"<h1>{html.escape(title)}</h1><p>Per chip and step. A compiler's estimate ({versions}), not a chip's.</p>"
        f'<img src="data:image/png;base64,{image}" alt="memory, time, memory against time">'
        f"<table><tr>{head}</tr>{rows}</table>\n"
    )


def _shown(x: float | None) -> str:
    return "" if x is None else f"{x:.3f}"
