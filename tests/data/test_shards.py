import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.data import shards as module
from jaxllm.data.corpus import Document
from jaxllm.data.shards import open_shards, prepare_shards, tokenise

DOCUMENTS = [Document(f"text number {i}, " * (i + 1), "odd" if i % 2 else "even") for i in range(10)]


def texts_of(shards, tokenizer):
    """Every document read back through the index."""
    lengths = np.diff(shards.offsets)
    return [tokenizer.decode(shards.read(d, 0, int(n))) for d, n in enumerate(lengths)]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_document_comes_back(tmp_path, bpe, workers):
    shards = prepare_shards(DOCUMENTS, bpe, tmp_path / "s", shard_characters=200, workers=workers)
    assert len(shards.manifest["shards"]) > 2
    assert texts_of(shards, bpe) == [document.text for document in DOCUMENTS]
    assert [shards.channels[i] for i in shards.channel_ids] == [document.channel for document in DOCUMENTS]
    assert sorted(p.suffix for p in (tmp_path / "s").iterdir() if p.suffix != ".npy") == [".json"]
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_the_manifest_counts(tmp_path, bpe):
    documents = [Document("é" * 3, "b"), Document("abc", "a"), Document("xy", "b")]
    shards = prepare_shards(documents, bpe, tmp_path / "s")
    ids = tokenise(bpe, [document.text for document in documents])
    assert shards.channels == ("a", "b")
    assert shards.manifest["counts"]["b"] == {
        "documents": 2, "tokens": len(ids[0]) + len(ids[2]), "characters": 5, "bytes": 8,
    }  # fmt: skip
    assert shards.total("bytes") == 11
    assert shards.total("tokens") == shards.tokens == sum(map(len, ids))
    assert shards.manifest["tokenizer"] == bpe.fingerprint


def test_a_document_starts_with_bos_and_ends_with_eos(bpe, byte_level):
    (ids,) = tokenise(bpe, ["abc"])
    assert (ids[0], ids[-1], ids.dtype) == (bpe.bos, bpe.eos, np.uint16)
    (ids,) = tokenise(byte_level, ["abc"])  # it has an eos but no bos
    assert ids.tolist() == [*byte_level.encode("abc"), byte_level.eos]


def test_wide_vocabularies(smollm2, monkeypatch):
    assert tokenise(smollm2, ["a"])[0].dtype == np.uint16
    monkeypatch.setattr(type(smollm2), "vocab", 1 << 17)
    assert tokenise(smollm2, ["a"])[0].dtype == np.uint32


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("ab\n ", max_size=60), size=st.integers(1, 9))
def test_long_documents_are_tokenised_in_sections(bpe, text, size, monkeypatch):
    monkeypatch.setattr(module, "_SECTION", size)
    parts = module._sections(text)
    assert "".join(parts) == text
    assert all(len(part) <= size for part in parts)
    (ids,) = tokenise(bpe, [text])
    assert bpe.decode(ids) == text


def test_ready_shards_are_reused(tmp_path, bpe):
    first = prepare_shards(DOCUMENTS, bpe, tmp_path / "s")
    before = (tmp_path / "s" / "manifest.json").stat().st_mtime_ns
    again = prepare_shards(iter(DOCUMENTS), bpe, tmp_path / "s")
    assert again.manifest == first.manifest
    assert (tmp_path / "s" / "manifest.json").stat().st_mtime_ns == before


def test_other_shards_are_refused(tmp_path, bpe, unigram):
    prepare_shards(DOCUMENTS, bpe, tmp_path / "s")
    with pytest.raises(ValueError, match="made with tokenizer"):
        prepare_shards(DOCUMENTS, unigram, tmp_path / "s")
    for other in (DOCUMENTS[:-1], [Document(d.text, "other") for d in DOCUMENTS]):
        with pytest.raises(ValueError, match="delete that directory to make it again"):
            prepare_shards(other, bpe, tmp_path / "s")


def test_an_interrupted_run_goes_on(tmp_path, bpe):
    def broken():
        yield from DOCUMENTS[:8]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_shards(broken(), bpe, tmp_path / "s", shard_characters=200)
    assert not (tmp_path / "s").exists()
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s.partial").glob("tokens-*.npy")}
    assert len(done) >= 2
    shards = prepare_shards(DOCUMENTS, bpe, tmp_path / "s", shard_characters=200)
    assert texts_of(shards, bpe) == [document.text for document in DOCUMENTS]
    assert done == {name: (tmp_path / "s" / name).stat().st_mtime_ns for name in done}


def test_leavings_of_another_corpus_are_not_used(tmp_path, bpe):
    def broken():
        yield from (Document(d.text.upper(), d.channel) for d in DOCUMENTS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_shards(broken(), bpe, tmp_path / "s", shard_characters=50)
    shards = prepare_shards(DOCUMENTS, bpe, tmp_path / "s", shard_characters=200)
    assert texts_of(shards, bpe) == [document.text for document in DOCUMENTS]
    assert len(list((tmp_path / "s").glob("tokens-*.npy"))) == len(shards.manifest["shards"])


def test_a_full_disk_leaves_nothing(tmp_path, bpe, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_array", full)
    with pytest.raises(OSError, match="No space left"):
        prepare_shards(DOCUMENTS, bpe, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert list((tmp_path / "s.partial").iterdir()) == []


def test_damaged_shards(tmp_path, bpe):
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        open_shards(tmp_path)
    prepare_shards(DOCUMENTS, bpe, tmp_path / "s")
    tokens, manifest = tmp_path / "s" / "tokens-00000.npy", tmp_path / "s" / "manifest.json"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"tokens-00000\.npy: not a whole"):
        open_shards(tmp_path / "s")
    np.save(tokens, np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match="where the manifest says"):
        open_shards(tmp_path / "s")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 0}))
    with pytest.raises(ValueError, match="shards of version 0"):
        open_shards(tmp_path / "s")


def test_no_documents(tmp_path, bpe):
    with pytest.raises(ValueError, match="at least one document, got none"):
        prepare_shards([], bpe, tmp_path / "s")
    assert not (tmp_path / "s").exists()
