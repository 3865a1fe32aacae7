"""The one attention op and the choice of who computes it.

`backend` says how, never what: all of them compute softmax(scale * q k^T under the mask) v, agree within rounding, and
never hold [T, S] above 1,024, however long the row.
"""

from __future__ import annotations

from typing import Literal, assert_never

from jaxtyping import Array, Float

from jaxllm import config
from jaxllm.kernels.chunked import chunked
from jaxllm.kernels.flash_gpu import flash_gpu
from jaxllm.kernels.flash_tpu import flash_tpu
from jaxllm.kernels.modifiers import NONE, Modifiers
from jaxllm.kernels.reference import reference
from jaxllm.records import Mask

Backend = Literal["reference", "chunked", "tpu", "gpu"]

LARGEST_MATERIALISED = 1024  # the longest row whose [T, S] scores may exist
DECODE_QUERIES = 16  # so few queries make [T, S] as small as the cache itself


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K h"],
    pattern: config.Pattern,
    mask: Mask,
    modifiers: Modifiers = NONE,
    *,
    scale: float,
    softcap: float | None = None,
    backend: Backend = "chunked",
    interpret: bool = False,
) -> Float[Array, "B T N h"]:
    """softmax(scale * q k^T) v over the pairs that `pattern` (static) and `mask` (arrays) allow; dtype of q.

    Query head n reads kv head n // (N / K); keys and values are never repeated. A query that sees no key (padding)
    gives zeros, and zero gradients. softcap c: scores become c * tanh(scores / c) before the mask (Gemma 2), then come
    the modifiers. Values may have another width than keys.

    backend: "reference" holds [T, S]; "chunked" is plain JAX in O(T + S) memory; "tpu" and "gpu" are Pallas kernels, in
    O(T + S) memory too. With slots given as arrays (cached decoding) a kernel's place is taken by plain JAX, as it is
    with at most 16 queries, with learned biases, with rounded slopes, and on GPUs with any modifier.
    interpret: run a kernel step by step on any device, for tests.

    Raises ValueError when shapes do not fit together, or when "reference" is asked to hold [T, S] above 1,024.
    """
    _check_shapes(q_BTNH, k_BSKH, v_BSKH)
    args = (q_BTNH, k_BSKH, v_BSKH, pattern, mask)
    match _choose(backend, q_BTNH.shape, k_BSKH.shape, v_BSKH.shape, mask, modifiers):
        case "reference":
            return reference(*args, modifiers, scale=scale, softcap=softcap)
        case "chunked":
            return chunked(*args, modifiers, scale=scale, softcap=softcap)
        case "tpu":
            return flash_tpu(*args, modifiers, scale=scale, softcap=softcap, interpret=interpret)
        case "gpu":
            return flash_gpu(*args, scale=scale, softcap=softcap, interpret=interpret)
        case other:
            assert_never(other)


def _choose(
    backend: Backend,
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    mask: Mask,
    modifiers: Modifiers,
) -> Backend:
    """`backend`, or the plain path that takes its place."""
    T, S = q[1], k[1]
    if T <= DECODE_QUERIES:
        return "reference"
    if backend == "reference" and max(T, S) > LARGEST_MATERIALISED:
        raise ValueError(
            f'attention: backend="reference" would hold [T, S] = [{T}, {S}] scores, above {LARGEST_MATERIALISED}; '
            'use "chunked", "tpu" or "gpu"'
        )
    m, slots = modifiers, mask.q_slot_BT is not None or mask.k_slot_BS is not None
    rounded = m.alibi is not None and m.alibi.rounded
    if backend == "tpu" and (slots or m.table_RN is not None or rounded):
        return "chunked"
    if backend == "gpu" and (slots or not m.plain or k != v):
        return "chunked"
    return backend


def _check_shapes(q: Array, k: Array, v: Array) -> None:
    alike = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
    if not alike or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"attention: wants q [B, T, N, H], k [B, S, K, H], v [B, S, K, h], got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: query heads N={q.shape[2]} must be a multiple of kv heads K={k.shape[2]}")
