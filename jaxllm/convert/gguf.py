"""GGUF files (versions 2 and 3): metadata, a table of tensors, a tokenizer; read by memory map.

A GGUF of the llama architecture keeps each head's q and k rows in interleaved pairs (2i, 2i + 1); the table of this
file turns them back into halves (i, i + H/2). Shapes are stored fastest axis first and are reversed here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from jax.typing import DTypeLike

from jaxllm import rules
from jaxllm.config import GLU, GQA, Block, Linear, Llama3, LMHead, RMSNorm, Rope, Scaling, Transformer, decoder
from jaxllm.convert.gguf_blocks import FORMATS, OTHER_NAMES, Format, dequantise, nbytes
from jaxllm.convert.hf import check_vocab
from jaxllm.data.gguf_tokenizer import from_gguf
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.models.common import Row, table
from jaxllm.nn.position import frequencies
from jaxllm.rules import Rule, Unused
from jaxllm.transformer import transformer_params

MAGIC = b"GGUF"
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")))
_STRING, _ARRAY = 8, 9

# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Entry:
    """A tensor's format, shape (slowest axis first) and first byte in the file."""

    format: Format
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class GGUF:
    """An open file: metadata by key, tensors by name, all bytes (mapped when local)."""

    path: epath.Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]
    content: np.ndarray

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32."""
        entry = self.tensors[name]
        raw = self.content[entry.start : entry.start + nbytes(entry.format, entry.shape)]
        return dequantise(entry.format, np.asarray(raw), entry.shape)


class _Cursor:
    """Reads scalars from a buffer, moving on."""

    def __init__(self, content: np.ndarray) -> None:
        self.content, self.at = content.data, 0

    def take(self, n: int) -> memoryview:
        if n > len(self.content) - self.at:
            raise EOFError(f"byte {self.at + n} is past the file's end, {len(self.content)}")
        self.at += n
        return self.content[self.at - n : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return bytes(self.take(self.number("Q"))).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, n = self.number("I"), self.number("Q")
            if inner in (_STRING, _ARRAY):
                return [self.value(inner) for _ in range(n)]
            dtype = np.dtype("<" + self.code(inner))
            return np.frombuffer(self.take(n * dtype.itemsize), dtype)
        return self.number(self.code(kind))

    def code(self, kind: int) -> str:
        code = _SCALARS.get(kind)
        if code is None:
            raise ValueError(f"metadata type {kind} at byte {self.at} does not exist")
        return code


def open_gguf(path: epath.PathLike) -> GGUF:
    """Read header, metadata and tensor table; every tensor must lie within the file.

    Raises FileNotFoundError; ValueError for another format or version, an unreadable tensor type (named with its
    tensor), or a file cut short.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the path of a .gguf file")
    content = _content(file)
    if bytes(content[:4]) != MAGIC:
        raise ValueError(
            f"{file}: a GGUF file begins with {MAGIC!r}, this one with {bytes(content[:4])!r}; check the path"
        )
    version = int.from_bytes(bytes(content[4:8]), "little")
    if version not in (2, 3):
        raise ValueError(f"{file}: GGUF version must be 2 or 3 (little endian), found {version}; convert it again")
    try:
        return _parse(file, content)
    except EOFError as error:
        raise ValueError(f"{file}: cut short ({error}); copy the file again") from error


def _content(file: epath.Path) -> np.ndarray:
    if "://" in str(file):
        return np.frombuffer(file.read_bytes(), np.uint8)
    if file.stat().length == 0:
        raise ValueError(f"{file}: the file is empty; copy it again")
    return np.memmap(str(file), np.uint8, mode="r")


def _parse(file: epath.Path, content: np.ndarray) -> GGUF:
    cursor = _Cursor(content)
    cursor.take(8)
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    metadata = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(key_count)}
    listed = [_listed(cursor, file) for _ in range(tensor_count)]
    alignment = int(metadata.get("general.alignment", 32))
    base = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, kind, shape, offset in listed:
        end = base + offset + nbytes(kind, shape)
        if end > len(content):
            raise EOFError(f"{name} {list(shape)} ends at byte {end}, the file has {len(content)}")
        if name in tensors:
            raise ValueError(f"{file}: tensor {name} is listed twice; convert the file again")
        tensors[name] = Entry(kind, shape, base + offset)
    return GGUF(file, metadata, tensors, content)


def _listed(cursor: _Cursor, file: epath.Path) -> tuple[str, Format, tuple[int, ...], int]:
    name, rank = cursor.string(), cursor.number("I")
    shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in FORMATS:
        known = ", ".join(sorted(f.name for f in FORMATS.values()))
        raise ValueError(
            f"{file}: tensor {name} has type {OTHER_NAMES.get(kind, kind)}, not supported; readable are {known}"
        )
    if math.prod(shape) >= 2**63:
        raise ValueError(f"{file}: tensor {name} has shape {list(shape)}; the file is damaged, copy it again")
    return name, FORMATS[kind], shape, offset


# ----------------------------------------------------------------------------------------------- llama architecture

_IGNORED = {
    "rope.dimension_count",
    "vocab_size",
    "tensor_data_layout",
    "attention.key_length",
    "attention.value_length",
}

TOP: tuple[Row, ...] = (
    ("token_embd.weight", "embed/tokens", None),
    ("output_norm.weight", "norm/scale", None),
    ("output.weight", "head/kernel", None),
)
BLOCK: tuple[Row, ...] = (
    ("attn_norm.weight", "attn_norm/scale", None),
    ("attn_q.weight", "attn/q/kernel", "(N H P) D -> D N (P H)"),
    ("attn_k.weight", "attn/k/kernel", "(K H P) D -> D K (P H)"),
    ("attn_v.weight", "attn/v/kernel", "(K H) D -> D K H"),
    ("attn_output.weight", "attn/o/kernel", "D (N H) -> N H D"),
    ("attn_q.bias", "attn/q/bias", "(N H P) -> N (P H)"),
    ("attn_k.bias", "attn/k/bias", "(K H P) -> K (P H)"),
    ("attn_v.bias", "attn/v/bias", "(K H) -> K H"),
    ("attn_output.bias", "attn/o/bias", None),
    ("ffn_norm.weight", "ffn_norm/scale", None),
    ("ffn_gate.weight", "ffn/gate/kernel", "F D -> D F"),
    ("ffn_up.weight", "ffn/up/kernel", "F D -> D F"),
    ("ffn_down.weight", "ffn/down/kernel", "D F -> F D"),
)


def names(spec: Transformer) -> list[Rule]:
    """The table of a llama GGUF: P = 2 are the pairs of a rotated head."""
    pairs = (("P", 2),)
    rules_ = table(spec, TOP, "blk.{}.", BLOCK, head="output.weight", sizes=pairs)
    return [*rules_, Unused("rope_freqs.weight"), Unused("*.attn_rot_embd")]


def spec_from_gguf(file: GGUF) -> Transformer:
    """The spec that metadata and tensor names give. Raises ValueError naming an unknown architecture, key or value."""
    meta = dict(file.metadata)
    kind = meta.get("general.architecture")
    if kind != "llama":
        raise ValueError(
            f"{file.path}: general.architecture must be 'llama', found {kind!r}; load its Hugging Face folder"
        )
    own = {key.removeprefix("llama."): value for key, value in meta.items() if key.startswith("llama.")}
    c = _read_keys(own, file)
    heads = c["attention.head_count"]
    width = own.get("attention.key_length", c["embedding_length"] // heads)
    if own.get("rope.dimension_count", width) != width or own.get("attention.value_length", width) != width:
        raise ValueError(
            f"{file.path}: rotated and value widths must be the head's {width}; partial ones are not supported"
        )
    rope = Rope(float(c["rope.freq_base"]), scaling=_scaling(c, file, width))
    bias, out_bias = "blk.0.attn_q.bias" in file.tensors, "blk.0.attn_output.bias" in file.tensors
    attn = GQA(heads, c["attention.head_count_kv"] or heads, width, rope, qkv_bias=bias, out_bias=out_bias)
    norm = RMSNorm(_decimal(c["attention.layer_norm_rms_epsilon"]))
    layers = decoder(Block(attn, GLU(c["feed_forward_length"]), norm), layers=c["block_count"])
    vocab = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else c["vocab_size"]
    tied = "output.weight" not in file.tensors
    return Transformer(vocab, c["embedding_length"], layers, norm, c["context_length"], head=LMHead(tied), name="llama")


_REQUIRED = (
    "context_length embedding_length block_count feed_forward_length attention.head_count "
    "attention.layer_norm_rms_epsilon"
)
_OPTIONAL = {
    "attention.head_count_kv": None,
    "rope.freq_base": 10_000.0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.original_context_length": None,
    "rope.scaling.finetuned": None,
    "rope.scale_linear": None,
    "vocab_size": 0,
}


def _read_keys(own: Mapping[str, Any], file: GGUF) -> dict[str, Any]:
    required = _REQUIRED.split()
    absent = [key for key in required if key not in own]
    strange = sorted(own.keys() - set(required) - _OPTIONAL.keys() - _IGNORED)
    if absent or strange:
        raise ValueError(
            f"{file.path}: metadata lacks llama.{absent}; convert the file again"
            if absent
            else f"{file.path}: metadata keys llama.{strange} might change the math and are not supported"
        )
    return _OPTIONAL | dict(own)


def _scaling(c: Mapping[str, Any], file: GGUF, width: int) -> Scaling | None:
    """Linear scaling is metadata; Llama 3's is a tensor of divisors per frequency, recognised by its values."""
    if "rope_freqs.weight" in file.tensors:
        return _llama3(file.read("rope_freqs.weight"), float(c["rope.freq_base"]), width, file)
    kind, factor = c["rope.scaling.type"], c["rope.scale_linear"] or c["rope.scaling.factor"]
    if kind not in ("none", "linear"):
        raise ValueError(f"{file.path}: llama.rope.scaling.type must be 'none' or 'linear', found {kind!r}")
    scaled = kind == "linear" or c["rope.scale_linear"] is not None
    return Linear(float(factor)) if scaled and factor not in (0, 1) else None


def _llama3(divisors: np.ndarray, theta: float, width: int, file: GGUF) -> Llama3:
    scaling = Llama3(float(divisors.max()))
    expected = frequencies(Rope(theta), width) / frequencies(Rope(theta, scaling=scaling), width)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"{file.path}: rope_freqs.weight must be Llama 3.1's (bands 1 and 4, original context 8192), "
            f"found divisors from {divisors.min()} to {divisors.max()}; no other is supported"
        )
    return scaling


def _decimal(x: float) -> float:
    """The short decimal that was rounded to float32: 1e-5, not 9.99999974738e-06."""
    return float(str(np.float32(x)))


# ---------------------------------------------------------------------------------------------------------- loading


def load_gguf(
    path: epath.PathLike, dtype: DTypeLike = "float32", shardings: Any = None
) -> tuple[Transformer, Any, Tokenizer]:
    """(spec, params, tokenizer) of a file; weights are dequantised exactly to float32, then cast to `dtype`."""
    file = open_gguf(path)
    spec = spec_from_gguf(file)
    tokenizer = from_gguf(file.metadata)
    check_vocab(tokenizer, spec, str(path))
    tree, rules_ = transformer_params(spec), names(spec)
    rules.check(rules_, tree, file.shapes, str(path))
    return spec, rules.load(rules_, tree, file.shapes, file.read, dtype, shardings), tokenizer
