"""The two tokenizer engines behind `Tokenizer`: sentencepiece models and `tokenizers` JSON files.

Both have the same small face, take and give plain Python values, and are built from the bytes of one file, so that a
tokenizer can be hashed, saved and pickled. Offsets are in characters, half open.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2

Spans = list[tuple[int, int]]
_MODEL: Any = sentencepiece_model_pb2  # protobuf makes the classes at run time, unseen by type checkers
_TEXT: Any = sentencepiece_pb2
_MARKER = "\u2581"  # sentencepiece writes a space so; a text that holds the character itself needs care


@dataclass(frozen=True)
class SentencePiece:
    """A sentencepiece `.model` (BPE or unigram).

    Unlike the library's own `encode`, the marker U+2581 survives a round trip when the model is lossless (identity
    normalisation, no dummy prefix, byte fallback): it is written as its three bytes instead of being read as a space.
    """

    content: bytes
    filename = "tokenizer.model"

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.content)

    @cached_property
    def vocab(self) -> int:
        """Number of ids."""
        return self._processor.get_piece_size()

    @cached_property
    def special(self) -> dict[str, int]:
        """Control tokens, text -> id."""
        return {self._processor.id_to_piece(i): i for i in range(self.vocab) if self._processor.is_control(i)}

    @cached_property
    def own_ids(self) -> dict[str, int | None]:
        """The ids that the model itself names, by role."""
        ids = {"bos": self._processor.bos_id(), "eos": self._processor.eos_id(), "pad": self._processor.pad_id()}
        return {role: None if i < 0 else i for role, i in ids.items()}

    @cached_property
    def adds_bos(self) -> bool:
        """Llama-style files (with a dummy prefix) start every text with BOS; the file itself does not say so."""
        return self.own_ids["bos"] is not None

    @cached_property
    def _marker_ids(self) -> dict[str, tuple[int, ...]]:
        rules = _MODEL.ModelProto.FromString(self.content).normalizer_spec
        lossless = rules.name == "identity" and not rules.add_dummy_prefix and not rules.remove_extra_whitespaces
        ids = tuple(self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _MARKER.encode())
        return {_MARKER: ids} if lossless and all(self._processor.is_byte(i) for i in ids) else {}

    @cached_property
    def _control_ids(self) -> dict[str, tuple[int, ...]]:
        return self._marker_ids | {text: (i,) for text, i in self.special.items()}

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, None when the vocabulary lacks it."""
        i = self._processor.piece_to_id(token)
        return i if self._processor.id_to_piece(i) == token else None

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of `text`; with `special`, control tokens spelt in it become their ids."""
        atoms = self._control_ids if special else self._marker_ids
        ids: list[int] = []
        for part in _split(text, atoms):
            ids += atoms[part] if part in atoms else self._processor.encode(part)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many plain texts, on all cores."""
        if any(atom in text for text in texts for atom in self._marker_ids):
            return [self.encode(text, special=False) for text in texts]
        return self._processor.encode(texts, num_threads=-1)

    def encode_spans(self, text: str, special: bool) -> tuple[list[int], Spans]:
        """Ids and the characters that each covers; the byte pieces of one character all cover it."""
        atoms = self._control_ids if special else self._marker_ids
        ids, spans, start = [], [], 0
        for part in _split(text, atoms):
            found, local = (atoms[part], [(0, len(part))] * len(atoms[part])) if part in atoms else self._spans(part)
            ids += found
            spans += [(start + a, start + b) for a, b in local]
            start += len(part)
        return ids, spans

    def _spans(self, text: str) -> tuple[list[int], Spans]:
        raw = self._processor.encode(text, out_type="serialized_proto")
        pieces = _TEXT.SentencePieceText.FromString(raw).pieces
        char_at = _char_offsets(text)
        spans = [(char_at[piece.begin], char_at[piece.end]) for piece in pieces]
        for i in range(len(pieces) - 2, -1, -1):  # sentencepiece gives a character to the last of its bytes only
            if spans[i][0] == spans[i][1] and self._processor.is_byte(pieces[i].id):
                spans[i] = spans[i + 1]
        return [piece.id for piece in pieces], spans

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Text of `ids`; control tokens are left out or spelt."""
        if skip_special:
            return self._processor.decode(ids)
        names, parts, run = {i: text for text, i in self.special.items()}, [], []
        for i in ids:
            if i in names:
                parts += [self._processor.decode(run), names[i]]
                run = []
            else:
                run.append(i)
        return "".join([*parts, self._processor.decode(run)])


def _split(text: str, atoms: dict[str, tuple[int, ...]]) -> list[str]:
    """The parts of `text` between and including `atoms`, the longest atom first; empty parts left out."""
    if not atoms:
        return [text] if text else []
    pattern = "|".join(re.escape(atom) for atom in sorted(atoms, key=len, reverse=True))
    return [part for part in re.split(f"({pattern})", text) if part]


def _char_offsets(text: str) -> list[int]:
    """offsets[b] is the number of characters of `text` that begin before byte b of its UTF-8 form."""
    offsets = [0]
    for index, char in enumerate(text):
        offsets += [index + 1] * len(char.encode())
    return offsets


@dataclass(frozen=True)
class HuggingFace:
    """A `tokenizers` JSON file (`tokenizer.json`). Its template (BOS, EOS ...) is never applied: callers add them."""

    content: bytes
    filename = "tokenizer.json"

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(self.content.decode())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(self._parsing.to_str())
        tokenizer.encode_special_tokens = True  # control tokens spelt in a text are text
        return tokenizer

    @cached_property
    def vocab(self) -> int:
        """Largest id + 1; added tokens may leave gaps."""
        return max(self._parsing.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special(self) -> dict[str, int]:
        """Control tokens, text -> id."""
        return {t.content: i for i, t in self._parsing.get_added_tokens_decoder().items() if t.special}

    @cached_property
    def own_ids(self) -> dict[str, int | None]:
        """Nothing: the file does not name roles."""
        return {"bos": None, "eos": None, "pad": None}

    @cached_property
    def adds_bos(self) -> bool:
        """True when the file's template puts a token before every text."""
        with_template = self._parsing.encode("a", add_special_tokens=True).ids
        return with_template[:1] != self._parsing.encode("a", add_special_tokens=False).ids[:1]

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """What the file's template puts before and after a text."""
        plain, framed = (self._parsing.encode("a", add_special_tokens=wanted).ids for wanted in (False, True))
        at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
        return framed[:at], framed[at + len(plain) :]

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, None when the vocabulary lacks it."""
        return self._parsing.token_to_id(token)

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of `text`; with `special`, control tokens spelt in it become their ids."""
        return (self._parsing if special else self._plain).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many plain texts, on all cores."""
        return [e.ids for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_spans(self, text: str, special: bool) -> tuple[list[int], Spans]:
        """Ids and the characters that each covers; the byte pieces of one character all cover it."""
        encoding = (self._parsing if special else self._plain).encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Text of `ids`; control tokens are left out or spelt."""
        return self._parsing.decode(ids, skip_special_tokens=skip_special)


Backend = SentencePiece | HuggingFace
