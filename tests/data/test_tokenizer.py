import io
import json
import pickle
from dataclasses import replace

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.data.gguf_tokenizer import from_gguf
from jaxllm.data.tokenizer import Stream, check_match, load
from jaxllm.data.train_tokenizer import train_tokenizer

AWKWARD = st.sampled_from(
    ["\u2581", "\u2585", "\0", "\t", "  ", "\r\n", "\ufffd", "\ufeff", "<s>", "<0x41>", "🙂", "日", "½", "the "]
)
TEXT = st.lists(AWKWARD | st.text(max_size=8), max_size=8).map("".join)
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(text=TEXT)
def test_nothing_is_lost(lossless, text):
    assert lossless.decode(lossless.encode(text)) == text


@many
@given(texts=st.lists(TEXT, max_size=4))
def test_a_batch_equals_its_texts(lossless, texts):
    assert lossless.encode_batch(texts) == [lossless.encode(text) for text in texts]


@many
@given(text=TEXT)
def test_spans_tile_the_text(lossless, text):
    ids, spans = lossless.encode_spans(text)
    assert ids == lossless.encode(text)
    covered = 0
    for start, end in spans:
        assert start <= covered <= end or (start, end) == (covered, covered)
        covered = max(covered, end)
    assert covered == len(text)


@pytest.fixture(scope="module")
def llama_like(texts):
    """A sentencepiece model with Llama's settings (dummy prefix), and the GGUF metadata that describe it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].splitlines()), model_writer=model, model_type="bpe", vocab_size=500,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    n = processor.get_piece_size()
    kinds = [2 if i == 0 else 3 if i < 3 else 6 if processor.is_byte(i) else 1 for i in range(n)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in range(n)],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in range(n)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return processor, metadata


@many
@given(text=TEXT.filter(lambda text: "\u2581" not in text))
def test_gguf_llama_equals_sentencepiece(llama_like, text):
    processor, metadata = llama_like
    tokenizer = from_gguf(metadata)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.encode(text) == processor.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text))


def test_golden_ids(smollm2, golden):
    for case in golden["tokenizer"]:
        assert smollm2.encode(case["text"], special=True) == case["ids"]
        assert smollm2.decode(case["ids"], skip_special=False) == case["decoded"]
    assert (smollm2.bos, smollm2.eos, smollm2.pad, smollm2.add_bos, smollm2.vocab) == (1, 2, 2, False, 49152)


def test_control_tokens_in_a_text_are_text(lossless):
    turn = lossless.special["<|turn|>"]
    assert turn not in lossless.encode("a<|turn|>b")
    ids = lossless.encode("a<|turn|>b", special=True)
    assert ids.count(turn) == 1
    assert lossless.decode(ids) == "ab"
    assert lossless.decode(ids, skip_special=False) == "a<|turn|>b"
    assert lossless.encode_spans("a<|turn|>b", special=True) == (ids, [(0, 1), (1, 9), (9, 10)])


# ------------------------------------------------------------------------------------------------------- streaming


def _stream(tokenizer, ids):
    stream, pieces = Stream(tokenizer), []
    for i in ids:
        stream, piece = stream.push(i)
        pieces.append(piece)
    return pieces, stream.finish()


@many
@given(text=TEXT.filter(lambda text: "\ufffd" not in text))
def test_a_stream_never_shows_half_a_character(lossless, text):
    pieces, rest = _stream(lossless, lossless.encode(text))
    assert "\ufffd" not in "".join(pieces)
    assert (("".join(pieces)), rest) == (text, "")


@many
@given(ids=st.lists(st.integers(0, 599), max_size=24))
def test_a_stream_of_any_ids_adds_up(lossless, ids):
    pieces, rest = _stream(lossless, ids)
    assert "".join(pieces) + rest == lossless.decode(ids)


@many
@given(ids=st.lists(st.integers(3, 499), max_size=24))
def test_a_stream_with_a_dummy_prefix_adds_up(llama_like, ids):
    tokenizer = from_gguf(llama_like[1])
    pieces, rest = _stream(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


# ------------------------------------------------------------------------------------------------- files and errors


def test_saved_and_loaded_equal(lossless, tmp_path):
    tokenizer = replace(lossless, chat_template="{{ messages }}")
    tokenizer.save(tmp_path / "t")
    assert load(tmp_path / "t") == tokenizer
    assert load(tmp_path / "t" / tokenizer.backend.filename).fingerprint == lossless.fingerprint
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a b") == tokenizer.encode("a b")


def test_a_hugging_face_folder(byte_level, tmp_path):
    byte_level.save(tmp_path)
    config = {"bos_token": {"content": "<|turn|>"}, "eos_token": "<|turn|>", "pad_token": None, "add_bos_token": True}
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load(tmp_path)
    assert (loaded.bos, loaded.eos, loaded.pad, loaded.add_bos, loaded.chat_template) == (0, 0, None, True, "yes")
    assert loaded.encode("a", bos=True) == [0, *byte_level.encode("a")]


def test_the_fingerprint_tells_what_decides_ids(bpe, unigram):
    assert bpe.fingerprint != unigram.fingerprint
    assert replace(bpe, eos=3).fingerprint != bpe.fingerprint
    assert replace(bpe, chat_template="x").fingerprint == bpe.fingerprint
    check_match(bpe, bpe.fingerprint, "run")
    with pytest.raises(ValueError, match="run was made with tokenizer"):
        check_match(unigram, bpe.fingerprint, "run")


def test_bad_tokenizer_files(tmp_path, lossless):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json or one \.model"):
        load(tmp_path)
    lossless.save(tmp_path)
    file = tmp_path / lossless.backend.filename
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable"):
        load(tmp_path)


def test_ids_outside_the_vocabulary(lossless):
    for ids in ([lossless.vocab], [-1, 5]):
        with pytest.raises(ValueError, match=rf"must be in 0\.\.{lossless.vocab - 1}"):
            lossless.decode(ids)


def test_bad_roles(byte_level):
    with pytest.raises(ValueError, match="eos=600 must be an id below"):
        replace(byte_level, eos=600)
    with pytest.raises(ValueError, match="bos=True needs"):
        byte_level.encode("a", bos=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "must be 'gpt2' or 'llama', got 'bert'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"}, "pre='new' is not known"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries for 500 tokens"),
    ],
)
def test_bad_gguf_metadata(llama_like, change, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(llama_like[1] | change)


def test_missing_gguf_metadata(llama_like):
    metadata = {key: value for key, value in llama_like[1].items() if not key.endswith("scores")}
    with pytest.raises(ValueError, match=r"lacks 'tokenizer\.ggml\.scores'"):
        from_gguf(metadata)


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(texts, kind, bpe, unigram):
    again = train_tokenizer(texts, 600, kind, special=["<|turn|>"])
    assert again.fingerprint == {"bpe": bpe, "unigram": unigram}[kind].fingerprint
    assert (again.vocab, again.bos, again.eos, again.pad) == (600, 1, 2, 3)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_largest_vocabulary_is_named_and_works(kind):
    with pytest.raises(ValueError, match="at most ") as refusal:
        train_tokenizer(["hello small world\n"] * 3, 4000, kind)
    largest = int(str(refusal.value).split("at most ")[1].split(",")[0])
    assert train_tokenizer(["hello small world\n"] * 3, largest, kind).vocab == largest


def test_the_smallest_vocabulary_is_named():
    with pytest.raises(ValueError, match="at least 271, got 100"):
        train_tokenizer(["hello small world\n"], 100)


def test_an_empty_corpus():
    with pytest.raises(ValueError, match="every document is empty"):
        train_tokenizer(["", " \n"], 300)


def test_one_very_long_line_is_used_whole():
    line = " ".join(f"word{i % 50}" for i in range(20_000)) + "x" * 9_000
    tokenizer = train_tokenizer([line], 290)
    assert len(tokenizer.encode("word word")) <= 4  # learned from a line far beyond sentencepiece's own limit
    assert len(tokenizer.encode("x" * 16)) == 1
