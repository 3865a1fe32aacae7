"""Tokens on disk: shards of whole documents, an index over all of them, a manifest.

    DIR/manifest.json      counts per channel, hashes, the tokenizer's fingerprint
    DIR/offsets.npy        int64 [documents + 1], where each document starts in the stream of all tokens
    DIR/channels.npy       int32 [documents], index into the manifest's channels
    DIR/tokens-00000.npy   uint16 or uint32, the documents of shard 0 one after the other

A document is [bos if the tokenizer adds one] + its tokens + [eos if there is one]. Shards are cut by characters, so
where they fall is known before anything is tokenised: they are made in any order, in parallel, and again only those
that are missing after an interruption. DIR appears by a rename when all is there.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Integer

from jaxllm.data.corpus import Document
from jaxllm.data.files import read_array, write_array, write_atomic
from jaxllm.data.tokenizer import Tokenizer, check_match

VERSION = 1
_SECTION = 1 << 20  # characters tokenised at once; longer documents are cut after a newline
_COUNTS = ("documents", "tokens", "characters", "bytes")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Shards:
    """Tokenised documents, memory-mapped. Made by `prepare_shards`, opened by `open_shards`."""

    path: epath.Path
    manifest: dict[str, Any]

    @property
    def channels(self) -> tuple[str, ...]:
        """Names; `channel` of a document is an index into them."""
        return tuple(self.manifest["channels"])

    @cached_property
    def offsets(self) -> Int[np.ndarray, " offsets"]:
        """int64 [documents + 1]: document d is tokens offsets[d]:offsets[d + 1] of the stream."""
        return read_array(self.path / "offsets.npy")

    @cached_property
    def channel_ids(self) -> Int[np.ndarray, " documents"]:
        """int32 [documents]."""
        return read_array(self.path / "channels.npy")

    @cached_property
    def _arrays(self) -> list[np.ndarray]:
        return [read_array(self.path / _tokens_name(i)) for i in range(len(self.manifest["shards"]))]

    @cached_property
    def _starts(self) -> Int[np.ndarray, " starts"]:
        return np.concatenate([[0], np.cumsum([shard["tokens"] for shard in self.manifest["shards"]])])

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens, bos and eos included."""
        return int(self.offsets[-1])

    def total(self, count: str) -> int:
        """Sum over channels of "documents", "tokens", "characters" or "bytes" (UTF-8, of the text alone)."""
        return sum(self.manifest["counts"][channel][count] for channel in self.channels)

    def read(self, document: int, start: int, length: int) -> Integer[np.ndarray, " length"]:
        """Tokens start:start + length of a document, in the stored dtype."""
        at = int(self.offsets[document]) + start
        shard = int(np.searchsorted(self._starts, at, side="right")) - 1
        local = at - int(self._starts[shard])
        return self._arrays[shard][local : local + length]


def open_shards(path: epath.PathLike, tokenizer: Tokenizer | None = None) -> Shards:
    """Open a directory of shards; with a tokenizer, check that it is the one that made them.

    Raises FileNotFoundError when it is none, ValueError when it is damaged, of another version or another tokenizer's.
    """
    folder = epath.Path(path)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder}: no manifest.json, so no shards; make them with prepare_shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder}: shards of version {manifest.get('version')}, this code reads {VERSION}; prepare again"
        )
    if tokenizer is not None:
        check_match(tokenizer, manifest["tokenizer"], f"shards {folder}")
    shards = Shards(folder, manifest)
    sizes = [len(array) for array in shards._arrays]
    wanted = [shard["tokens"] for shard in manifest["shards"]]
    if sizes != wanted or shards.tokens != sum(wanted):
        raise ValueError(
            f"{folder}: shards hold {sizes} tokens where the manifest says {wanted}; delete and prepare again"
        )
    return shards


def prepare_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: epath.PathLike,
    *,
    shard_characters: int = 1 << 26,
    workers: int = 1,
    progress: Progress = lambda line: None,
) -> Shards:
    """Tokenise `documents` (an iterable that can be read twice) into `out`, or open what is there already.

    workers: processes; the tokenizers use all cores of one process anyway, so more pay only for large corpora.
    Raises ValueError when `out` holds shards of another corpus or tokenizer, or when there are no documents.
    """
    folder = epath.Path(out)
    groups = partial(_groups, documents, shard_characters)
    if (folder / "manifest.json").is_file():
        shards = open_shards(folder, tokenizer)
        _check_corpus(shards, _corpus_hash(_digest(group) for group in groups()))
        progress(f"shards: reusing {shards.tokens:,} tokens of {shards.documents:,} documents in {folder}")
        return shards
    partial_folder = folder.with_name(folder.name + ".partial")
    partial_folder.mkdir(parents=True, exist_ok=True)
    make = partial(_make_shard, tokenizer, partial_folder)
    entries = []
    for entry in _in_order(make, enumerate(groups()), workers):
        entries.append(entry)
        progress(f"shards: {len(entries)} done, {sum(e['tokens'] for e in entries):,} tokens")
    _finish(partial_folder, entries, tokenizer)
    partial_folder.rename(folder)
    for stale in folder.glob("entry-*.json"):  # only resuming needs them
        stale.unlink()
    return open_shards(folder, tokenizer)


def _check_corpus(shards: Shards, wanted: str) -> None:
    if shards.manifest["corpus"] != wanted:
        raise ValueError(
            f"{shards.path} was made from corpus {shards.manifest['corpus'][:12]}, but this one is {wanted[:12]}; "
            "delete that directory to make it again, or choose another"
        )


# ------------------------------------------------------------------------------------------------ from text to files


def _groups(documents: Iterable[Document], most: int) -> Iterator[list[Document]]:
    """Runs of documents of at most `most` characters (or one longer document)."""
    group: list[Document] = []
    size = 0
    for document in documents:
        if group and size + len(document.text) > most:
            yield group
            group, size = [], 0
        group.append(document)
        size += len(document.text)
    if group:
        yield group


def _digest(group: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in group:
        for part in (document.channel.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _corpus_hash(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _sections(text: str) -> list[str]:
    """Pieces of at most `_SECTION` characters, cut after a newline where there is one; joined they are the text."""
    parts, start = [], 0
    while len(text) - start > _SECTION:
        end = text.rfind("\n", start + 1, start + _SECTION) + 1 or start + _SECTION
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def tokenise(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Integer[np.ndarray, " _"]]:
    """Each text as [bos] + ids + [eos], uint16 when the vocabulary allows, else uint32."""
    dtype = np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32
    sections = [_sections(text) for text in texts]
    encoded = iter(tokenizer.encode_batch([part for parts in sections for part in parts]))
    head = [tokenizer.bos] if tokenizer.add_bos else []
    tail = [] if tokenizer.eos is None else [tokenizer.eos]
    return [np.array(head + [i for _ in parts for i in next(encoded)] + tail, dtype) for parts in sections]


def _tokens_name(index: int) -> str:
    return f"tokens-{index:05d}.npy"


def _make_shard(tokenizer: Tokenizer, folder: epath.Path, numbered: tuple[int, list[Document]]) -> dict[str, Any]:
    """Write the tokens of one group and, last, its entry; or give the entry that an earlier try left."""
    index, group = numbered
    record = folder / f"entry-{index:05d}.json"
    key = {"corpus": _digest(group), "tokenizer": tokenizer.fingerprint}
    if record.is_file():
        entry = json.loads(record.read_text())
        if {name: entry[name] for name in key} == key:
            return entry
    tokens = tokenise(tokenizer, [document.text for document in group])
    stream = np.concatenate(tokens)
    write_array(folder / _tokens_name(index), stream)
    entry = key | {
        "tokens": len(stream),
        "sha256": hashlib.sha256(stream.tobytes()).hexdigest(),
        "lengths": [len(t) for t in tokens],
        "channels": [document.channel for document in group],
        "counts": _counts(group, tokens),
    }
    write_atomic(record, json.dumps(entry).encode())
    return entry


def _counts(group: Sequence[Document], tokens: Sequence[np.ndarray]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for document, ids in zip(group, tokens, strict=True):
        row = counts.setdefault(document.channel, dict.fromkeys(_COUNTS, 0))
        sizes = (1, len(ids), len(document.text), len(document.text.encode()))
        for name, size in zip(_COUNTS, sizes, strict=True):
            row[name] += size
    return counts


def _in_order(make: Callable[..., Any], jobs: Iterable[Any], workers: int) -> Iterator[Any]:
    """make(job) for each job in order; with several processes, at most two jobs per process are read ahead."""
    if workers <= 1:
        yield from map(make, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: list[Future[Any]] = []
        for job in jobs:
            running.append(pool.submit(make, job))
            if len(running) >= 2 * workers:
                yield running.pop(0).result()
        for future in running:
            yield future.result()


def _finish(folder: epath.Path, entries: list[dict[str, Any]], tokenizer: Tokenizer) -> None:
    """Write the index and the manifest; drop shards of an earlier, longer corpus."""
    if not entries:
        raise ValueError("prepare_shards: there must be at least one document, got none; check the corpus")
    names = sorted({name for entry in entries for name in entry["counts"]})
    ids = {name: i for i, name in enumerate(names)}
    lengths = np.array([n for entry in entries for n in entry["lengths"]], np.int64)
    write_array(folder / "offsets.npy", np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
    write_array(folder / "channels.npy", np.array([ids[c] for e in entries for c in e["channels"]], np.int32))
    manifest = {
        "version": VERSION,
        "tokenizer": tokenizer.fingerprint,
        "corpus": _corpus_hash(entry["corpus"] for entry in entries),
        "channels": names,
        "counts": {n: {c: sum(e["counts"].get(n, {}).get(c, 0) for e in entries) for c in _COUNTS} for n in names},
        "shards": [{key: entry[key] for key in ("tokens", "sha256", "corpus")} for entry in entries],
    }
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    for stale in folder.glob("tokens-*.npy"):
        if stale.name not in {_tokens_name(i) for i in range(len(entries))}:
            stale.unlink()
