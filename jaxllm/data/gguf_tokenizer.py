"""A tokenizer from the metadata of a GGUF file, which stores vocabularies but neither regexes nor normalisers.

Metadata keys are the file's own (`tokenizer.ggml.tokens`, `.token_type`, `.merges`, `.scores`, `.model`, `.pre`,
`.bos_token_id` ..., `tokenizer.chat_template`; GGUF specification, "Tokenizer"), values plain Python or numpy.
The split rule behind each `pre` name is a fact about the model that was converted, listed in `_SPLITS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxllm.data.backends import HuggingFace, SentencePiece
from jaxllm.data.tokenizer import Tokenizer

_MODEL: Any = sentencepiece_model_pb2  # protobuf makes the classes at run time, unseen by type checkers
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # values of token_type that matter here

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),)
_DIGITS = (pre_tokenizers.Digits(individual_digits=True), *_GPT2)


def _regex(pattern: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return (split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


_LLAMA3 = _regex(_WORDS + r"\p{N}{1,3}" + _REST)
_QWEN2 = _regex(_WORDS + r"\p{N}" + _REST)
_SPLITS = {
    "default": _GPT2, "gpt-2": _GPT2, "olmo": _GPT2, "phi-2": _GPT2, "jina-en": _GPT2,
    "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS, "command-r": _DIGITS, "codeshell": _DIGITS,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3, "dbrx": _LLAMA3,
    "qwen2": _QWEN2, "stablelm2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}  # fmt: skip
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3"}  # a split that is itself a token is not merged
_COMPOSED = {"qwen2", "deepseek-r1-qwen"}  # NFC before anything else


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file: `tokenizer.ggml.model` "gpt2" (byte-level BPE) or "llama" (scores, byte fallback).

    Raises ValueError for another model, an unknown split rule, or a missing key, naming it.
    """
    kind = _get(metadata, "model")
    match kind:
        case "gpt2":
            return _finish(metadata, HuggingFace(_byte_level(metadata)), add_bos=False)
        case "llama":
            return _finish(metadata, SentencePiece(_sentencepiece(metadata)), add_bos=True)
        case _:
            raise ValueError(
                f"GGUF tokenizer.ggml.model must be 'gpt2' or 'llama', got {kind!r}; "
                "load the model from its Hugging Face folder instead"
            )


def _get(metadata: Mapping[str, Any], key: str) -> Any:
    name = f"tokenizer.ggml.{key}"
    if name not in metadata:
        raise ValueError(f"GGUF metadata lacks {name!r}; the file holds no whole tokenizer, convert it again")
    return metadata[name]


def _finish(metadata: Mapping[str, Any], backend: HuggingFace | SentencePiece, add_bos: bool) -> Tokenizer:
    def role(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return None if value is None else int(value)

    bos = role("bos")
    wanted = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, bos, role("eos"), role("padding"), wanted and bos is not None, template)


def _types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    types = [int(t) for t in metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))]
    if len(types) != len(tokens):
        raise ValueError(f"GGUF token_type has {len(types)} entries for {len(tokens)} tokens; the file is damaged")
    return types


def _byte_level(metadata: Mapping[str, Any]) -> bytes:
    """`tokenizer.json` of a byte-level BPE: vocabulary, merges and split rule put back together."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise ValueError(f"GGUF tokenizer.ggml.pre={pre!r} is not known; known are {sorted(_SPLITS)}")
    tokens = [str(token) for token in _get(metadata, "tokens")]
    merges = [tuple(merge.split(" ")) for merge in _get(metadata, "merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(_SPLITS[pre]))
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, _types(metadata, tokens), strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            added = tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
            (tokenizer.add_special_tokens if kind == _CONTROL else tokenizer.add_tokens)([added])
    return tokenizer.to_str().encode()


def _sentencepiece(metadata: Mapping[str, Any]) -> bytes:
    """A sentencepiece model: pieces with scores; token types have sentencepiece's own numbers."""
    tokens, scores = [str(token) for token in _get(metadata, "tokens")], _get(metadata, "scores")
    proto = _MODEL.ModelProto()
    for token, score, kind in zip(tokens, scores, _types(metadata, tokens), strict=True):
        proto.pieces.add(piece=token, score=float(score), type=kind)
    proto.trainer_spec.model_type = _MODEL.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()
