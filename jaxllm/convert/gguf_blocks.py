"""The block formats of GGUF tensors, dequantised to exact float32.

Every format is a row of bytes per block of 32 or 256 weights: scales first or last, then packed low bits, then high
bits. Products and sums are float32 in the order of the ggml reference, so that results agree with it to the last bit.
(Facts: the ggml quantisation formats, `block_*` in ggml-common.h.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

Bytes = UInt8[np.ndarray, "blocks bytes"]
Values = Float[np.ndarray, "blocks weights"]


@dataclass(frozen=True)
class Format:
    """A tensor type: `weights` per block, `size` bytes per block, and how blocks become float32."""

    name: str
    weights: int
    size: int
    decode: Callable[[Bytes], Values]


def _half(b: Bytes, at: int) -> Float[np.ndarray, "blocks 1"]:
    """The float16 at byte `at` of each block, as float32."""
    return b[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(b: Bytes) -> UInt8[np.ndarray, "blocks weights"]:
    """Low halves of all bytes, then high halves."""
    return np.concatenate([b & 15, b >> 4], 1)


def _bits(b: Bytes) -> UInt8[np.ndarray, "blocks weights"]:
    """Single bits, least significant first."""
    return np.unpackbits(b, axis=1, bitorder="little")


def _q4_0(b: Bytes) -> Values:
    return _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Bytes) -> Values:
    return _half(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b, 2)


def _q5_0(b: Bytes) -> Values:
    q = _nibbles(b[:, 6:]) | _bits(b[:, 2:6]) << 4
    return _half(b, 0) * (q.astype(np.float32) - 16)


def _q5_1(b: Bytes) -> Values:
    q = _nibbles(b[:, 8:]) | _bits(b[:, 4:8]) << 4
    return _half(b, 0) * q.astype(np.float32) + _half(b, 2)


def _q8_0(b: Bytes) -> Values:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


# ------------------------------------------------------------- K-quants: superblocks of 256 with scales of their own


def _planes(b: Bytes, bits: int) -> UInt8[np.ndarray, "blocks runs planes 32"]:
    """Fields of `bits` bits: for each run of 32 bytes, first all lowest fields, then the next ones ..."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None]
    return (b.reshape(len(b), -1, 1, 32) >> shifts) & ((1 << bits) - 1)


def _scaled(d: np.ndarray, scales: np.ndarray, q: np.ndarray) -> Float[np.ndarray, "blocks groups per_group"]:
    """d * scale of each group * q."""
    groups = scales.shape[1]
    return (d * scales.astype(np.float32))[:, :, None] * q.reshape(len(q), groups, -1).astype(np.float32)


def _six_bit_pairs(s: Bytes) -> tuple[np.ndarray, np.ndarray]:
    """8 scales and 8 minima of 6 bits out of 12 bytes: the upper four of each keep their high bits with the lower."""
    low, high, both = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scales = np.concatenate([low & 63, (both & 15) | (low >> 6) << 4], 1)
    minima = np.concatenate([high & 63, (both >> 4) | (high >> 6) << 4], 1)
    return scales, minima


def _q4_k(b: Bytes) -> Values:
    scales, minima = _six_bit_pairs(b[:, 4:16])
    offset = (_half(b, 2) * minima.astype(np.float32))[:, :, None]
    return (_scaled(_half(b, 0), scales, _planes(b[:, 16:144], 4)) - offset).reshape(len(b), 256)


def _q5_k(b: Bytes) -> Values:
    scales, minima = _six_bit_pairs(b[:, 4:16])
    offset = (_half(b, 2) * minima.astype(np.float32))[:, :, None]
    q = _planes(b[:, 48:176], 4).reshape(len(b), 8, 32) | _planes(b[:, 16:48], 1).reshape(len(b), 8, 32) << 4
    return (_scaled(_half(b, 0), scales, q) - offset).reshape(len(b), 256)


def _q6_k(b: Bytes) -> Values:
    low = (b[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[None, None, :, None]) & 15
    high = _planes(b[:, 128:192], 2)
    q = (low.reshape(len(b), -1) | high.reshape(len(b), -1) << 4).astype(np.int8) - 32
    return _scaled(_half(b, 208), b[:, 192:208].view(np.int8), q).reshape(len(b), 256)


def _q2_k(b: Bytes) -> Values:
    scales, minima = b[:, :16] & 15, b[:, :16] >> 4
    offset = (_half(b, 82) * minima.astype(np.float32))[:, :, None]
    return (_scaled(_half(b, 80), scales, _planes(b[:, 16:80], 2)) - offset).reshape(len(b), 256)


def _q3_k(b: Bytes) -> Values:
    packed = b[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    high = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[None, :, None]) & 3
    scales = (low | high.reshape(len(b), 16) << 4).astype(np.int8) - 32
    below = 4 * (1 - _planes(b[:, :32], 1).reshape(len(b), 256).astype(np.int8))  # a clear high bit subtracts 4
    q = _planes(b[:, 32:96], 2).reshape(len(b), 256).astype(np.int8) - below
    return _scaled(_half(b, 108), scales, q).reshape(len(b), 256)


def _plain(name: str, dtype: np.dtype) -> Format:
    return Format(name, 1, dtype.itemsize, lambda b: b.reshape(-1).view(dtype).astype(np.float32)[:, None])


FORMATS: dict[int, Format] = {
    0: _plain("F32", np.dtype(np.float32)),
    1: _plain("F16", np.dtype(np.float16)),
    30: _plain("BF16", np.dtype(ml_dtypes.bfloat16)),
    2: Format("Q4_0", 32, 18, _q4_0),
    3: Format("Q4_1", 32, 20, _q4_1),
    6: Format("Q5_0", 32, 22, _q5_0),
    7: Format("Q5_1", 32, 24, _q5_1),
    8: Format("Q8_0", 32, 34, _q8_0),
    10: Format("Q2_K", 256, 84, _q2_k),
    11: Format("Q3_K", 256, 110, _q3_k),
    12: Format("Q4_K", 256, 144, _q4_k),
    13: Format("Q5_K", 256, 176, _q5_k),
    14: Format("Q6_K", 256, 210, _q6_k),
}
"""Readable tensor types by their number in the file."""

OTHER_NAMES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""Types that exist and are not readable here, for the error message."""


def nbytes(kind: Format, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises ValueError when its rows are no whole blocks."""
    if not shape or shape[-1] % kind.weights:
        raise ValueError(f"rows of {shape[-1:]} weights are no whole blocks of {kind.weights} ({kind.name})")
    return math.prod(shape) // kind.weights * kind.size


def dequantise(kind: Format, raw: UInt8[np.ndarray, " bytes"], shape: tuple[int, ...]) -> Float[np.ndarray, ...]:
    """float32 of `shape`. Plain float32 is a view of `raw`."""
    if kind.name == "F32":
        return raw.view(np.float32).reshape(shape)
    return kind.decode(raw.reshape(-1, kind.size)).reshape(shape)
