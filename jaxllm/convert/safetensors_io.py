"""safetensors files, read tensor by tensor and written as a stream.

A file is 8 bytes of header length (little endian), a JSON header name -> {dtype, shape, data_offsets}, then the bytes.
All that a header can tell (truncation, absent shards, doubled names, dtypes) is checked before any tensor is read.
Local files and buckets alike (etils.epath).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from jaxllm.data.files import write_atomic

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000
_DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, the offset of its first byte there, its dtype's name, its shape."""

    file: epath.Path
    start: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Folder:
    """The tensors of one or many files, known by their headers."""

    path: epath.Path
    tensors: Mapping[str, Stored]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the file's dtype. Raises ValueError when that is not float32, float16 or bfloat16."""
        stored = self.tensors[name]
        if stored.dtype not in _DTYPES:
            raise ValueError(
                f"{stored.file}: {name} has dtype {stored.dtype}; readable are {sorted(_DTYPES)}. "
                "Take the checkpoint that is not quantised, or convert it to one of these"
            )
        dtype = _DTYPES[stored.dtype]
        with stored.file.open("rb") as stream:
            stream.seek(stored.start)
            content = stream.read(math.prod(stored.shape) * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(stored.shape)


def open_folder(path: epath.PathLike) -> Folder:
    """Read the headers of a folder with `model.safetensors`, or with an index and its shards.

    Raises FileNotFoundError when there is neither or a shard is absent; ValueError when a file is cut short or damaged,
    or when the index and the shards disagree about where a tensor is.
    """
    folder = epath.Path(path)
    if (folder / INDEX).exists():
        return _open_sharded(folder)
    if (folder / SINGLE).exists():
        return Folder(folder, _header(folder / SINGLE))
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    raise FileNotFoundError(
        f"{folder}: weights are {SINGLE}, or {INDEX} with its shards; found {others or 'none'}. "
        "Save pickled weights as safetensors first"
    )


def _open_sharded(folder: epath.Path) -> Folder:
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / INDEX}: must be JSON with a weight_map ({error!r}); copy the index again"
        ) from error
    absent = [shard for shard in shards if not (folder / shard).exists()]
    if absent:
        raise FileNotFoundError(f"{folder / INDEX} names shards that are not there: {absent}; copy them too")
    tensors: dict[str, Stored] = {}
    for shard in shards:
        for name, stored in _header(folder / shard).items():
            if name in tensors:
                raise ValueError(f"{folder}: {name} is in both {tensors[name].file.name} and {shard}; remove one copy")
            tensors[name] = stored
    for name, shard in weight_map.items():
        place = tensors[name].file.name if name in tensors else "no shard"
        if place != shard:
            raise ValueError(
                f"{folder / INDEX}: {name} must be in {shard}, found in {place}; copy index and shards again"
            )
    return Folder(folder, tensors)


def _header(file: epath.Path) -> dict[str, Stored]:
    size = file.stat().length
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{file}: {size} bytes cannot hold a safetensors header of {length}; copy the file again")
        content = stream.read(length)
    try:
        header = json.loads(content, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {name: _stored(file, 8 + length, entry) for name, entry in header.items()}
        ends = [8 + length + entry["data_offsets"][1] for entry in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a safetensors file ({error}); copy it again") from error
    end = max(ends, default=8 + length)
    if end != size:
        raise ValueError(f"{file}: its header promises {end} bytes, the file has {size}; copy the file again")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    doubled = {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else ()
    if doubled:
        raise ValueError(f"the header names {sorted(doubled)} more than once")
    return dict(pairs)


def _stored(file: epath.Path, base: int, entry: Mapping[str, Any]) -> Stored:
    (start, stop), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    if dtype in _DTYPES and stop - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"shape {list(shape)} of {dtype} does not fill its {stop - start} bytes")
    return Stored(file, base + start, dtype, shape)


# --------------------------------------------------------------------------------------------------------- writing


def write_folder(
    folder: epath.Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: np.dtype,
    limit: int,
) -> None:
    """Write `tensors`, which come in the order of `shapes`, in files of at most `limit` bytes of data (or one tensor).

    One file is `model.safetensors`; several are numbered and have an index, which is written last. Only one tensor is
    held at a time. A file appears under its name once it is whole.
    """
    shards = _shards(shapes, dtype.itemsize, limit)
    many = len(shards) > 1
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)] if many else [SINGLE]
    stream = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        _write(folder / file, {name: shapes[name] for name in names}, stream, dtype)
    if many:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(folder / INDEX, json.dumps(index, indent=1).encode())


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    """Names per file, in order."""
    numbered, shard, held = [], 0, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if held and held + size > limit:
            shard, held = shard + 1, 0
        numbered.append((shard, name))
        held += size
    return [[name for _, name in group] for _, group in groupby(numbered, key=lambda pair: pair[0])]


def _write(
    file: epath.Path, shapes: Mapping[str, tuple[int, ...]], stream: Iterator[tuple[str, np.ndarray]], dtype: np.dtype
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for expected, shape in shapes.items():
                name, array = next(stream)
                if name != expected or array.shape != shape:
                    raise ValueError(f"{file}: {expected} {shape} must come next, got {name} {array.shape}")
                out.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
