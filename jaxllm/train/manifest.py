"""The seal on a checkpoint: a file of checksums, written last. Without a valid one a directory is no checkpoint.

    <step>/manifest.json  {"checksum": body's, "body": {step, metric, meta, arrays, files: {path: [bytes, CRC-32]}}}

It is written to a temporary name and renamed as the last act of a save, and removed as the first act of a deletion, so
that a kill at any moment leaves either a whole checkpoint or one that does not count. Sums are CRC-32, against
accidents and not against forgers (2.3 GB/s here, where BLAKE2b does 0.4): one flipped bit in any file, the manifest
included, is found.
"""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from etils import epath

from jaxllm.data.files import write_atomic

NAME = "manifest.json"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    metric: lower is better; None when it was not measured.  meta: the caller's own JSON.
    arrays: path in the TrainState -> [shape, dtype].  files: path in the directory -> [bytes, CRC-32].
    """

    step: int
    metric: float | None
    meta: dict[str, Any]
    arrays: dict[str, list[Any]]
    files: dict[str, list[int]]


def list_files(directory: epath.Path, prefix: str = "") -> list[str]:
    """Paths of all files below `directory`, relative to it, sorted; the manifest itself is left out."""
    found = []
    for entry in sorted(directory.iterdir()):
        name = prefix + entry.name
        if entry.is_dir():
            found += list_files(entry, name + "/")
        elif name != NAME:
            found.append(name)
    return found


def checksum(path: epath.Path) -> list[int]:
    """[size in bytes, CRC-32] of a file, read in 4 MiB pieces."""
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def checksums(directory: epath.Path) -> dict[str, list[int]]:
    """`checksum` of every file below `directory`, four at a time (summing releases the interpreter's lock)."""
    names = list_files(directory)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: checksum(directory / name), names), strict=True))


def seal(
    directory: epath.Path, step: int, metric: float | None, meta: dict[str, Any], arrays: dict[str, list[Any]]
) -> None:
    """Make `directory`, whose data are complete, a checkpoint."""
    body = asdict(Manifest(step, metric, meta, arrays, checksums(directory)))
    write_atomic(directory / NAME, json.dumps({"checksum": _checksum(body), "body": body}).encode())


def unseal(directory: epath.Path) -> None:
    """Delete a checkpoint, seal first: a kill in between leaves nothing that counts."""
    (directory / NAME).unlink(missing_ok=True)
    directory.rmtree()


def is_sealed(directory: epath.Path) -> bool:
    """True when there is a manifest, valid or not."""
    return (directory / NAME).exists()


def read(directory: epath.Path) -> Manifest:
    """The manifest of a checkpoint. Raises ValueError when it is damaged."""
    path = directory / NAME
    try:
        data = json.loads(path.read_text())
        body = data["body"]
        if data["checksum"] != _checksum(body):
            raise ValueError("its own checksum does not match")
        return Manifest(**body)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def damage(directory: epath.Path) -> str | None:
    """The first thing wrong with a sealed checkpoint, in words; None when every byte is as it was written."""
    try:
        files, found = read(directory).files, checksums(directory)
    except (ValueError, OSError) as error:
        return str(error)
    for name in sorted(files.keys() | found.keys()):
        if name not in found:
            return f"{directory / name} is missing"
        if name not in files:
            return f"{directory / name} does not belong there"
        if found[name] != files[name]:
            (size, _), (expected, _) = found[name], files[name]
            what = f"{size} bytes instead of {expected}" if size != expected else f"{size} bytes, of which some changed"
            return f"{directory / name} is damaged: {what}"
    return None


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
