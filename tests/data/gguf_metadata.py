"""The metadata half of a GGUF file (version 3, little-endian), read with `struct` alone: an oracle for tests."""

import struct
from pathlib import Path
from typing import Any

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def read_metadata(path: Path) -> dict[str, Any]:
    """All key-value pairs; strings decoded, arrays as lists."""
    with path.open("rb") as file:

        def scalar(form: str) -> Any:
            return struct.unpack(form, file.read(struct.calcsize(form)))[0]

        def string() -> str:
            return file.read(scalar("<Q")).decode()

        def value(kind: int) -> Any:
            if kind == 8:
                return string()
            if kind == 9:
                inner, count = scalar("<I"), scalar("<Q")
                return [value(inner) for _ in range(count)]
            return scalar(_SCALARS[kind])

        assert file.read(4) == b"GGUF"
        _version, _tensors, pairs = scalar("<I"), scalar("<Q"), scalar("<Q")
        return {string(): value(scalar("<I")) for _ in range(pairs)}
