import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.corpus import Corpus, Document, LastChars, LastDocuments, join, split


def lines(*records):
    return "\n".join(json.dumps(record) for record in records) + "\n"


def test_every_format_in_one_directory(tmp_path):
    (tmp_path / "b.txt").write_text("plain é")
    (tmp_path / "a.jsonl").write_text(
        lines({"text": "one", "channel": "x"}, {"text": ""}, {"text": "two", "title": "t"})
    )
    (tmp_path / "sub").mkdir()
    with gzip.open(tmp_path / "sub" / "c.jsonl.gz", "wt") as file:
        file.write(lines({"text": "three"}))
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    documents = [Document("one", "x"), Document("two", "a"), Document("plain é", "b"), Document("three", "c")]
    corpus = Corpus(str(tmp_path))
    assert list(corpus) == documents
    assert list(corpus) == documents  # it can be read again
    assert list(Corpus(str(tmp_path / "*.txt"))) == documents[2:3]
    assert list(Corpus(str(tmp_path / "a.jsonl"))) == documents[:2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: a corpus file must hold text, but it is empty"),
        ("a.txt", b"text\0more", r"a\.txt: .* NUL at byte 4"),
        ("a.txt", b"caf\xe9 noir", r"a\.txt: .* byte 3 is 0xe9"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl, line 2: each line must be one JSON object"),
        ("a.jsonl", b'\n{"body": "ok"}\n', r"a\.jsonl, line 2: .* string \"text\", got \['body'\]"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: .* got list"),
        ("a.jsonl", b'{"text": "a", "channel": 3}\n', r'line 1: "channel" must be a string, got 3'),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', "half a surrogate pair at character 1"),
        ("a.jsonl", b'{"text": ""}\n', "every document is empty"),
        ("a.jsonl.gz", b"not gzip", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "abc"}\n', mtime=0)[:-9], "not a whole gzip file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(Corpus(str(tmp_path / name)))


def test_nothing_there(tmp_path):
    for path in (tmp_path, tmp_path / "gone.txt", tmp_path / "gone" / "*.txt"):
        with pytest.raises(FileNotFoundError, match="give a file, directory or glob"):
            list(Corpus(str(path)))


DOCUMENTS = st.lists(st.builds(Document, st.text("ab\n", min_size=1, max_size=5), st.sampled_from("xyz")), min_size=1)


@settings(deadline=None)
@given(documents=DOCUMENTS, data=st.data())
def test_the_last_characters_exactly(documents, data):
    whole = join(documents)
    if len(whole) < 2:
        return
    count = data.draw(st.integers(1, len(whole) - 1))
    train, validation = split(documents, LastChars(count))
    assert join(validation) == whole[-count:]
    between = whole[len(join(train)) : -count]
    assert join(train) + between + join(validation) == whole
    assert between in ("", "\n\n")
    assert all(document.text for document in train + validation)
    channels = [document.channel for document in train + validation]
    cut = len(train) + len(validation) - len(documents)
    assert cut in (0, 1)
    assert channels[: len(train)] == [d.channel for d in documents[: len(train)]]
    assert channels[len(train) :] == [d.channel for d in documents[len(train) - cut :]]


@pytest.mark.parametrize("count", [0, -1, 4, 5])
def test_both_sides_must_hold_text(count):
    with pytest.raises(ValueError, match="must be between 1 and 3, the corpus has 4"):
        split([Document("a", "x"), Document("b", "x")], LastChars(count))


def test_a_fraction_of_the_documents():
    documents = [Document(str(i), "x") for i in range(10)]
    assert split(documents, LastDocuments(0.2)) == (documents[:8], documents[8:])
    assert split(documents, LastDocuments(0.01)) == (documents[:9], documents[9:])
    for fraction in (0.0, 1.0, 0.99):
        with pytest.raises(ValueError, match="must leave some on both sides"):
            split(documents, LastDocuments(fraction))
