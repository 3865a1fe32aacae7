"""Train a tokenizer that loses nothing: decode(encode(x)) == x for every Unicode text.

Identity normalisation, no dummy prefix, whitespace runs and newlines kept, digits apart, bytes for characters outside
the vocabulary. Ids: 0 unknown (never produced), 1 bos, 2 eos, 3 pad, then `special`, 256 bytes, pieces.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import sentencepiece
from etils import epath

from jaxllm.data.backends import SentencePiece
from jaxllm.data.tokenizer import Tokenizer

_SENTENCE = 2_000  # characters a training sentence may have; lines are joined up to it
_SAMPLE = {"bpe": 50_000_000, "unigram": 4_000_000}  # characters read at most: EM costs ten times as much as merging
_THREADS = 4  # fixed, not the machine's: unigram sums floats per thread


def train_tokenizer(
    texts: Iterable[str],
    vocab: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    out_dir: epath.PathLike | None = None,
    special: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Tokenizer:
    """Train on `texts` and save to `out_dir` when given. The same texts give the same tokenizer, byte for byte.

    vocab: exact size.  special: further control tokens (chat turns ...).  progress: called with a line per phase.
    A corpus above a size is thinned evenly (BPE 50 M, unigram 4 M characters).
    Raises ValueError for an empty corpus, or one for which `vocab` is too large or too small, naming the limit.
    """
    started = time.perf_counter()
    sentences = _thin(list(_sentences(texts)), _SAMPLE[kind])
    if not sentences:
        raise ValueError("train_tokenizer: the corpus must hold text, but every document is empty; check its path")
    progress(f"tokenizer: {kind}, vocabulary {vocab:,}, from {sum(map(len, sentences)):,} characters")
    tokenizer = Tokenizer(SentencePiece(_train(sentences, vocab, kind, special)), bos=1, eos=2, pad=3, add_bos=True)
    if out_dir is not None:
        tokenizer.save(out_dir)
    progress(f"tokenizer: trained in {time.perf_counter() - started:.1f} s")
    return tokenizer


def _train(sentences: list[str], vocab: int, kind: str, special: Sequence[str]) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type=kind, vocab_size=vocab,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_digits=True, byte_fallback=True, character_coverage=0.9999,
            unk_id=0, bos_id=1, eos_id=2, pad_id=3, control_symbols=list(special), num_threads=_THREADS,
            max_sentence_length=8 * _SENTENCE, seed_sentencepiece_size=max(100_000, 10 * vocab), minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise _vocab_error(vocab, str(error)) from error
    return model.getvalue()


def _vocab_error(vocab: int, message: str) -> ValueError:
    """Sentencepiece's refusal, as a rule with the value and the cure."""
    if found := re.search(r"value <= (\d+)", message):
        return ValueError(
            f"train_tokenizer: this corpus supports a vocabulary of at most {found[1]}, got {vocab}; "
            f"set vocab={found[1]} or less, or give more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return ValueError(
            f"train_tokenizer: the bytes and characters of this corpus need a vocabulary of at least {found[1]}, "
            f"got {vocab}; set vocab={found[1]} or more"
        )
    return ValueError(f"train_tokenizer: sentencepiece refused vocab={vocab}: {message}; try another size")


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Runs of whole lines of about `_SENTENCE` characters; a longer line is cut at spaces, or anywhere without one."""
    for text in texts:
        buffer = ""
        for line in _short_lines(text):
            if buffer and len(buffer) + len(line) > _SENTENCE:
                yield buffer
                buffer = ""
            buffer += line
        if buffer.strip():
            yield buffer


def _short_lines(text: str) -> Iterator[str]:
    """Lines with their ends, none above `_SENTENCE` characters; joined they are the text."""
    for line in re.findall(r"[^\n]*\n+|[^\n]+", text):
        while len(line) > _SENTENCE:
            cut = line.rfind(" ", 1, _SENTENCE)
            cut = cut if cut > 0 else _SENTENCE
            yield line[:cut]
            line = line[cut:]  # noqa: PLW2901
        yield line


def _thin(sentences: list[str], most: int) -> list[str]:
    """Every n-th sentence, n the smallest that leaves at most `most` characters."""
    stride = -(-sum(map(len, sentences)) // most)
    return sentences[:: max(stride, 1)]
