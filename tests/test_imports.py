"""Imports point only downwards in the room order of docs/architecture.md."""

import ast
from pathlib import Path

import pytest

import jaxllm

ROOT = Path(jaxllm.__file__).parent
ROOMS = [
    "config", "serial", "host", "params", "lowered", "leaves", "sharding", "mesh", "remat", "runtime", "records",
    "cache", "kernels", "nn", "rules", "transformer", "encoder_decoder", "vision", "two_tower", "vision_language",
    "flax_model", "architectures", "apply", "flops", "show_mask", "models", "experiment", "data", "convert",
    "objectives", "decode", "train", "model", "conversion", "plan", "doctor", "cli",
]  # fmt: skip


def room(module: str) -> str:
    return module.split(".")[1]


def modules():
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py" and p.name != "__main__.py")


def imported(tree: ast.Module):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("jaxllm."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxllm":
            names = [f"jaxllm.{a.name}" for a in node.names] if node.module == "jaxllm" else [node.module]
            yield from names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = room(".".join(("jaxllm", *path.relative_to(ROOT).with_suffix("").parts)))
    assert own in ROOMS, f"{own} has no place in the room order"
    for name in imported(ast.parse(path.read_text())):
        other = room(name)
        assert ROOMS.index(other) <= ROOMS.index(own), f"{path.relative_to(ROOT)} imports {name}, which lies above it"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_hidden_imports(path):
    """No jaxllm import inside a function: it would hide a cycle."""
    tree = ast.parse(path.read_text())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            assert not list(imported(ast.Module(function.body, []))), f"{path.name}: {function.name} imports jaxllm"


def test_config_room_is_free_of_jax():
    for path in (*sorted((ROOT / "config").glob("*.py")), ROOT / "serial.py"):
        names = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
        text = " ".join(ast.unparse(n) for n in names)
        assert "jax" not in text.replace("jaxllm", ""), f"{path.name} imports jax"
