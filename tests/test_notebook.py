"""The notebook runs from top to bottom on a CPU, as it is."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore")
def test_quickstart_notebook(tmp_path, monkeypatch):
    for name in ("configs", "data", "notebooks", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(tmp_path / "notebooks" / "quickstart.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path / "notebooks")}})
    client.execute(env=dict(os.environ))
    text = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))
    assert "bits per byte" in text
    assert "did you mean 'optimizer.peak_lr'" in text
    assert (tmp_path / "runs" / "notebook" / "losses.png").exists()
