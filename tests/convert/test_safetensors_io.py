"""Our reader against the safetensors library's writer, and back; every kind of damage."""

import json

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from jaxllm.convert.safetensors_io import INDEX, SINGLE, open_folder, write_folder

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.linspace(-1, 1, 5).astype(np.float16),
    "c": np.array(3.0, ml_dtypes.bfloat16),
}


@pytest.fixture
def single(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / "two.safetensors")
    files = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return tmp_path


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_reads_what_the_library_writes(kind, request):
    folder = open_folder(request.getfixturevalue(kind))
    assert folder.shapes == {name: x.shape for name, x in TENSORS.items()}
    for name, x in TENSORS.items():
        got = folder.read(name)
        assert (got.dtype, got.shape, got.tobytes()) == (x.dtype, x.shape, x.tobytes())


@pytest.mark.parametrize(("limit", "files"), [(1000, 1), (30, 2), (1, 3)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_writes_what_the_library_reads(tmp_path, limit, files, dtype):
    tensors = {name: x.astype(dtype) for name, x in TENSORS.items()}
    limit = limit if np.dtype(dtype).itemsize == 4 else max(limit // 2, 1)
    write_folder(
        epath.Path(tmp_path), {n: x.shape for n, x in tensors.items()}, tensors.items(), np.dtype(dtype), limit
    )
    written = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(written) == files
    assert (tmp_path / INDEX).exists() == (files > 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(written + ([INDEX] if files > 1 else []))
    found = {}
    for name in written:
        found |= load_file(tmp_path / name)
    assert {n: x.tobytes() for n, x in found.items()} == {n: x.tobytes() for n, x in tensors.items()}
    assert open_folder(tmp_path).shapes == {n: x.shape for n, x in tensors.items()}


def test_a_failed_write_leaves_nothing(tmp_path):
    def half():
        yield "a", TENSORS["a"]
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_folder(epath.Path(tmp_path), {"a": (2, 3), "b": (5,)}, half(), np.dtype(np.float32), 1000)
    assert list(tmp_path.iterdir()) == []


def test_truncated(single):
    content = (single / SINGLE).read_bytes()
    for cut in (0, 5, 60, len(content) - 1):
        (single / SINGLE).write_bytes(content[:cut])
        with pytest.raises(ValueError, match=rf"{SINGLE}.*copy the file again|copy it again"):
            open_folder(single)


def test_header_that_is_no_json(single):
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:8] + b"x" + content[9:])
    with pytest.raises(ValueError, match="not a safetensors file"):
        open_folder(single)


def test_shape_that_does_not_fill_its_bytes(single):
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content.replace(b"[2,3]", b"[2,2]"))
    with pytest.raises(ValueError, match="does not fill"):
        open_folder(single)


def test_unreadable_dtype_names_tensor_and_dtype(tmp_path):
    save_file({"w": np.zeros((2, 2), np.int8)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"w has dtype I8.*BF16"):
        open_folder(tmp_path).read("w")


def test_absent_shard_is_named(sharded):
    (sharded / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"two.safetensors"):
        open_folder(sharded)


def test_tensor_in_two_shards(sharded):
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, sharded / "one.safetensors")
    with pytest.raises(ValueError, match=r"b is in both one.safetensors and two.safetensors"):
        open_folder(sharded)


def test_index_that_names_the_wrong_shard(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] |= {"a": "two.safetensors", "z": "one.safetensors"}
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a must be in two.safetensors, found in one.safetensors"):
        open_folder(sharded)
    index["weight_map"]["a"] = "one.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"z must be in one.safetensors, found in no shard"):
        open_folder(sharded)


def test_broken_index(sharded):
    (sharded / INDEX).write_text('{"weight_map": ["a"]}')
    with pytest.raises(ValueError, match="weight_map"):
        open_folder(sharded)


def test_pickled_weights_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin.*Save pickled weights"):
        open_folder(tmp_path)
