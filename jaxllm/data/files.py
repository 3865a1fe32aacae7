"""Files that appear whole or not at all, on local disks and in buckets."""

from __future__ import annotations

import io
import os
import uuid

import numpy as np
from etils import epath


def write_atomic(path: epath.Path, content: bytes | memoryview) -> None:
    """Write to a temporary name beside `path`, then rename. A failure (disk full ...: OSError) leaves nothing."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_array(path: epath.Path, array: np.ndarray) -> None:
    """Write an array of any shape and dtype as `.npy`, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getbuffer())


def read_array(path: epath.Path) -> np.ndarray:
    """An `.npy` file: memory-mapped when local, read whole from a bucket.

    Raises ValueError when the file is cut short or no array.
    """
    try:
        if os.path.exists(os.fspath(path)):
            return np.load(os.fspath(path), mmap_mode="r", allow_pickle=False)
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a whole .npy file ({error}); delete its directory and prepare again") from error
