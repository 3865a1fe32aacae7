"""One `Tokenizer` face over every engine, with a streaming decoder.

A text is only text: unless `special=True` is given, `"<|im_end|>"` in a document or in a user's message is spelt out in
ordinary tokens and cannot end a turn. Beginning- and end-of-text ids are never added silently either: `bos=True` asks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, SupportsInt

from etils import epath

from jaxllm.data.backends import Backend, HuggingFace, SentencePiece, Spans
from jaxllm.data.files import write_atomic


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. Immutable, picklable; equal when all fields are.

    bos, eos, pad: ids, None when the vocabulary has none.  add_bos: whether a document or prompt starts with `bos`
    (the caller passes `bos=tokenizer.add_bos`).  chat_template: jinja2 source, see `jaxllm.data.chat`.
    """

    backend: Backend
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    add_bos: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        for role in ("bos", "eos", "pad"):
            i = getattr(self, role)
            if i is not None and not 0 <= i < self.backend.vocab:
                raise ValueError(f"Tokenizer: {role}={i} must be an id below the vocabulary's {self.backend.vocab}")
        if self.add_bos and self.bos is None:
            raise ValueError("Tokenizer: add_bos=True needs a bos id, but bos=None; give one or set add_bos=False")

    @property
    def vocab(self) -> int:
        """Number of ids; every id is below it."""
        return self.backend.vocab

    @property
    def special(self) -> dict[str, int]:
        """Control tokens, text -> id."""
        return self.backend.special

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """Ids that stand before and after one whole text for an encoder: [CLS] and [SEP], bos."""
        return self.backend.frame if isinstance(self.backend, HuggingFace) else (self._prefix(self.add_bos), [])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides ids; the chat template is left out."""
        head = json.dumps([type(self.backend).__name__, self.bos, self.eos, self.pad, self.add_bos])
        return hashlib.sha256(head.encode() + self.backend.content).hexdigest()

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Ids of `text`. `special`: control tokens spelt in it become their ids. `bos`: the bos id comes first."""
        return self._prefix(bos) + self.backend.encode(text, special)

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False) -> list[list[int]]:
        """Ids of many plain texts, on all cores."""
        return [self._prefix(bos) + ids for ids in self.backend.encode_batch(list(texts))]

    def encode_spans(self, text: str, *, special: bool = False) -> tuple[list[int], Spans]:
        """Ids, and for each the half-open span of characters of `text` that it stands for."""
        return self.backend.encode_spans(text, special)

    def decode(self, ids: Iterable[SupportsInt], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. ValueError for an id outside the vocabulary."""
        plain = [int(i) for i in ids]
        if plain and (min(plain) < 0 or max(plain) >= self.vocab):
            raise ValueError(
                f"decode: ids must be in 0..{self.vocab - 1}, got {min(plain)}..{max(plain)}; "
                "does this tokenizer belong to the model?"
            )
        return self.backend.decode(plain, skip_special)

    def text_of(self, i: int | None) -> str:
        """The spelling of one token, control tokens included; "" for None."""
        return "" if i is None else self.decode([i], skip_special=False)

    def save(self, directory: epath.PathLike) -> None:
        """Write `tokenizer.model` or `tokenizer.json`, and `tokenizer_config.json`, which `load` reads back equal."""
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        roles = {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}
        config = roles | {"add_bos_token": self.add_bos, "chat_template": self.chat_template}
        write_atomic(folder / self.backend.filename, self.backend.content)
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2).encode())

    def _prefix(self, bos: bool) -> list[int]:
        if bos and self.bos is None:
            raise ValueError("encode: bos=True needs a tokenizer with a bos id, but this one has bos=None")
        return [self.bos] if bos and self.bos is not None else []


def load(path: epath.PathLike) -> Tokenizer:
    """Read a tokenizer from a `.model` or `tokenizer.json` file, or from a directory that holds one (HF folders too).

    In a directory `tokenizer.json` wins over `tokenizer.model`, as in the reference. Roles and the chat template come
    from `tokenizer_config.json` and `chat_template.jinja` beside it.
    Raises FileNotFoundError when there is none, ValueError when the file is no tokenizer.
    """
    file = _tokenizer_file(epath.Path(path))
    kind = HuggingFace if file.suffix == ".json" else SentencePiece
    backend = kind(file.read_bytes())
    try:
        backend.vocab  # noqa: B018  (parsing is lazy; a broken file must fail here)
    except Exception as error:
        raise ValueError(f"{file}: not a readable {kind.__name__} tokenizer ({error}); copy the file again") from error
    config = _config(file.parent)
    roles = {role: _role(backend, config, role) for role in ("bos", "eos", "pad")}
    add_bos = config.get("add_bos_token", backend.adds_bos)
    return Tokenizer(
        backend, **roles, add_bos=bool(add_bos) and roles["bos"] is not None, chat_template=_template(config)
    )


def check_match(tokenizer: Tokenizer, fingerprint: str, owner: str) -> None:
    """ValueError unless `tokenizer` is the one that made `owner` (a checkpoint, shards) with `fingerprint`."""
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{owner} was made with tokenizer {fingerprint[:12]}, but this one is {tokenizer.fingerprint[:12]}; "
            "use the tokenizer saved beside it, or make it again"
        )


def _tokenizer_file(path: epath.Path) -> epath.Path:
    if path.is_file():
        return path
    for name in (HuggingFace.filename, SentencePiece.filename):
        if (path / name).is_file():
            return path / name
    models = sorted(path.glob("*.model")) if path.is_dir() else []
    if len(models) == 1:
        return models[0]
    raise FileNotFoundError(
        f"{path}: a tokenizer is a tokenizer.json or one .model file, or a directory with one; "
        f"found {[p.name for p in models] or 'none'}"
    )


def _config(folder: epath.Path) -> dict[str, Any]:
    """The settings beside the tokenizer, later files winning; {} when there are none."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= json.loads((folder / name).read_text())
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = (folder / "chat_template.jinja").read_text()
    return config


def _role(backend: Backend, config: dict[str, Any], role: str) -> int | None:
    if f"{role}_token_id" in config:
        return config[f"{role}_token_id"]
    token = config.get(f"{role}_token")
    if token is None:
        return backend.own_ids[role]
    return backend.token_id(token["content"] if isinstance(token, dict) else token)


def _template(config: dict[str, Any]) -> str | None:
    """A template is a string, or a list of named ones of which "default" is taken."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


# ------------------------------------------------------------------------------------------------------- streaming


@dataclass(frozen=True)
class Stream:
    """Decoding one id at a time; what was given out never changes and never ends inside a character.

        stream, piece = stream.push(next_id)
        ...
        print(stream.finish())

    A value, so that rows of a batch, beams and retries can share a past. Text is held back while the ids so far end in
    what may be the first bytes of a character. `context` are the ids of the last text given out: engines that join
    words (a dummy space, "##") need them to decode what follows.
    """

    tokenizer: Tokenizer
    skip_special: bool = True
    context: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()

    def push(self, i: int) -> tuple[Stream, str]:
        """Take one id; give the new state and the text that is now certain, possibly ""."""
        stream = replace(self, pending=(*self.pending, int(i)))
        text = stream.finish()
        if not text or text.endswith("\ufffd"):
            return stream, ""
        return replace(stream, context=stream.pending, pending=()), text

    def finish(self) -> str:
        """The text still held back; U+FFFD for bytes that never became a character."""
        shown = self.tokenizer.decode(self.context, skip_special=self.skip_special)
        return self.tokenizer.decode(self.context + self.pending, skip_special=self.skip_special)[len(shown) :]
