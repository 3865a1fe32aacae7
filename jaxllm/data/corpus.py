"""Raw documents from text and JSONL files, and the rule that holds some out.

A corpus is read lazily and can be read again and again; every problem is an error that names the file and the line.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import assert_never

from etils import epath

SEPARATOR = "\n\n"  # what stands between documents when they are thought of as one text
_ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Document:
    """A text and the channel (topic, language, source ...) under which its loss is reported."""

    text: str
    channel: str


@dataclass(frozen=True)
class Corpus:
    """The documents of a file, a directory (read recursively, in order of path) or a glob pattern, local or gs://.

    `.jsonl[.gz]`: an object per line with `text`, and `channel` if it has one. Any other file is one document of UTF-8
    text. The default channel is the file's stem. Documents without text are left out.
    """

    path: str

    def __iter__(self) -> Iterator[Document]:
        """Raises FileNotFoundError when nothing is there, ValueError for an empty, binary or malformed file."""
        empty = True
        for file in corpus_files(self.path):
            for document in _read(file):
                empty = False
                yield document
        if empty:
            raise ValueError(
                f"corpus {self.path}: a corpus must hold text, but every document is empty; check the path"
            )


def corpus_files(path: str) -> list[epath.Path]:
    """The files of a corpus, sorted by path; hidden ones are left out."""
    root = epath.Path(path)
    if root.is_file():
        return [root]
    if root.is_dir():
        found = [p for p in _descend(root) if p.name.endswith(_ENDINGS)]
    else:
        found = list(root.parent.glob(root.name)) if root.parent.is_dir() else []
    files = sorted((p for p in found if not p.name.startswith(".") and p.is_file()), key=str)
    if not files:
        raise FileNotFoundError(
            f"corpus {path}: nothing there, or no file ending in {', '.join(_ENDINGS)}; give a file, directory or glob"
        )
    return files


def _descend(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _descend(path)
        else:
            yield path


def _read(file: epath.Path) -> Iterator[Document]:
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_jsonl(file)
    elif text := _decode(b"".join(_lines(file)), str(file)):
        yield Document(text, _stem(file))


def _stem(file: epath.Path) -> str:
    return file.name.removesuffix(".gz").rsplit(".", 1)[0]


def _lines(file: epath.Path) -> Iterator[bytes]:
    """Lines of a file that may be compressed. ValueError when the compression is broken or the file is empty."""
    empty = True
    with file.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
        try:
            for line in stream:
                empty = False
                yield line
        except (OSError, EOFError) as error:
            raise ValueError(f"{file}: not a whole gzip file ({error}); copy it again") from error
    if empty:
        raise ValueError(f"{file}: a corpus file must hold text, but it is empty; remove it or fill it")


def _decode(line: bytes, place: str) -> str:
    if b"\0" in line:
        raise ValueError(
            f"{place}: a corpus must be UTF-8 text, but there is a NUL at byte {line.index(0)}: a binary file?"
        )
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: a corpus must be UTF-8 text, but byte {error.start} is 0x{line[error.start]:02x}; "
            "convert it (iconv -t utf-8) or remove it"
        ) from error


def _read_jsonl(file: epath.Path) -> Iterator[Document]:
    for number, line in enumerate(_lines(file), 1):
        if text := _decode(line, f"{file}, line {number}").strip():
            document = _parse(text, f"{file}, line {number}", _stem(file))
            if document.text:
                yield document


def _parse(line: str, place: str, stem: str) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: each line must be one JSON object ({error}); got {line[:60]!r}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        got = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f'{place}: each line must be an object with a string "text", got {got}; rename the field')
    channel = record.get("channel", stem)
    if not isinstance(channel, str):
        raise ValueError(f'{place}: "channel" must be a string, got {channel!r}')
    return Document(_no_surrogates(record["text"], place), channel)


def _no_surrogates(text: str, place: str) -> str:
    """JSON escapes can spell half a surrogate pair, which no UTF-8 text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: text holds half a surrogate pair at character {error.start}; clean it") from error
    return text


# -------------------------------------------------------------------------------------------------------- held-out


@dataclass(frozen=True)
class LastChars:
    """Hold out exactly the last `count` characters of the documents joined by two newlines, in order."""

    count: int


@dataclass(frozen=True)
class LastDocuments:
    """Hold out the last `fraction` of the documents, at least one."""

    fraction: float


HeldOut = LastChars | LastDocuments


def split(documents: Iterable[Document], rule: HeldOut) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents, channels kept. ValueError when either side would be empty.

    With `LastChars` a document may be cut in two, and joined(training) + joined(validation) is joined(documents) but
    for one separator where the cut falls exactly between two documents (it then goes to the validation side).
    """
    documents = list(documents)
    match rule:
        case LastChars(count):
            size = len(join(documents))
            if not 0 < count < size:
                raise ValueError(
                    f"LastChars: count={count} must be between 1 and {size - 1}, the corpus has {size} characters"
                )
            return _cut(documents, size - count)
        case LastDocuments(fraction):
            count = max(1, round(len(documents) * fraction))
            if not 0 < fraction < 1 or count >= len(documents):
                raise ValueError(
                    f"LastDocuments: fraction={fraction} of {len(documents)} documents must leave some on both sides; "
                    "with few documents use LastChars"
                )
            return documents[:-count], documents[-count:]
        case other:
            assert_never(other)


def join(documents: Sequence[Document]) -> str:
    """The documents as one text."""
    return SEPARATOR.join(document.text for document in documents)


def _cut(documents: list[Document], at: int) -> tuple[list[Document], list[Document]]:
    """Cut the joined text at character `at`; newlines of a separator that is cut stay with the document beside them."""
    start = 0
    for i, document in enumerate(documents):
        end = start + len(document.text)
        if at < end:  # inside this document, or at its first character
            head, tail = document.text[: at - start], document.text[at - start :]
            before = [*documents[:i], Document(head, document.channel)] if head else documents[:i]
            return before, [Document(tail, document.channel), *documents[i + 1 :]]
        if at < end + len(SEPARATOR):  # inside the separator after it
            head, tail = SEPARATOR[: at - end], SEPARATOR[at - end :]
            following = documents[i + 1]
            before = [*documents[:i], Document(document.text + head, document.channel)]
            return before, [Document(tail + following.text, following.channel), *documents[i + 2 :]]
        start = end + len(SEPARATOR)
    raise AssertionError(f"unreachable: cut {at} is past the end {start}")
