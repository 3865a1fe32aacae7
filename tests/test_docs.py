"""Programs in the documentation run as they stand."""

import re
import runpy
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def plain_jax():
    """As a reader has it: rank promotion allowed."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_own_loop(tmp_path, monkeypatch, plain_jax):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_loop.md").read_text(), re.S)
    script = tmp_path / "own_loop.py"
    script.write_text(code)
    monkeypatch.chdir(ROOT)
    result = runpy.run_path(str(script))
    first = 5.0  # (1 - 1/256)^2 ln 256 = 5.5 at the start
    assert result["value"] < first - 1.5, "the loss of the 20-line program must fall"
