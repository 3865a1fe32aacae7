"""What the flash kernels of all devices share: the static side of a call, its operands, scores and their mask."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm import config
from jaxllm.kernels.pattern import allowed
from jaxllm.kernels.reference import Names, precision
from jaxllm.kernels.schedule import Arrays, Schedule, Shape, choose
from jaxllm.records import Mask

LOG2_E = math.log2(math.e)


class Call(NamedTuple):
    """What is static in a call; hashable. N, K: heads.  T, S: real lengths, padded to blocks in the operands."""

    pattern: config.Pattern
    scale: float
    softcap: float | None
    N: int
    K: int
    T: int
    S: int
    block_q: int
    block_k: int
    arrays: Arrays
    interpret: bool
    alibi: bool = False

    @property
    def fold(self) -> float:
        """The factor folded into q: what tanh wants with a soft-cap, what exp2 wants without."""
        return self.scale * LOG2_E if self.softcap is None else self.scale / self.softcap

    def shape(self, tile_q: int, tile_k: int) -> Shape:
        """The schedule's view of the lengths."""
        return Shape(self.T, self.S, self.block_q, self.block_k, tile_q, tile_k)


class Operands(NamedTuple):
    """q: [B * N, T, H].  k: [B * K, S, H].  v: [B * K, S, h].  Segments: int32 [B, 1, T], [B, 1, S], or None.

    Lengths are padded to whole blocks.
    """

    q: Float[Array, "BN T H"]
    k: Float[Array, "BK S H"]
    v: Float[Array, "BK S h"]
    q_segment: Int[Array, "B 1 T"] | None
    k_segment: Int[Array, "B 1 S"] | None


def arrays_of(mask: Mask) -> Arrays:
    """Which arrays `mask` has. Raises ValueError for slots, which kernels take as implied."""
    if mask.q_slot_BT is not None or mask.k_slot_BS is not None:
        raise ValueError('flash attention: slots must be 0..T-1 and 0..S-1, got arrays; use backend="chunked"')
    return Arrays(mask.q_segment_BT is not None, mask.k_segment_BS is not None, mask.prefix_B is not None)


def operands(call: Call, q: Array, k: Array, v: Array, mask: Mask) -> Operands:
    """Heads first, and whole blocks. q: [B, T, N, H]; k, v: [B, S, K, H]."""
    return Operands(
        _heads(q, call.block_q),
        _heads(k, call.block_k),
        _heads(v, call.block_k),
        _row(mask.q_segment_BT, call.block_q),
        _row(mask.k_segment_BS, call.block_k),
    )


def _heads(x_BTNH: Float[Array, "B T N H"], block: int) -> Float[Array, "BN t H"]:
    B, T, N, H = x_BTNH.shape
    x = jnp.pad(x_BTNH.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, -T % block), (0, 0)))
    return x.reshape(B * N, -1, H)


def _row(segment_BT: Int[Array, "B T"] | None, block: int) -> Int[Array, "B 1 t"] | None:
    if segment_BT is None:
        return None
    return jnp.pad(segment_BT.astype(jnp.int32), ((0, 0), (0, -segment_BT.shape[1] % block)))[:, None]


def result(call: Call, o: Float[Array, "BN t h"]) -> Float[Array, "B T N h"]:
    """Back from heads first."""
    return o[:, : call.T].reshape(-1, call.N, call.T, o.shape[-1]).transpose(0, 2, 1, 3)


def codes(call: Call, plan: Schedule, shape: Shape, x: Operands, prefix: Array | None) -> tuple[Array, Array]:
    """`schedule.choose` for these operands."""
    if not any(call.arrays):
        return choose(plan, shape, None)
    rows = [None if s is None else s[:, 0] for s in (x.q_segment, x.k_segment)]
    return choose(plan, shape, Names(None, None, *rows, prefix))  # type: ignore[arg-type]  # slots are implied


def may_meet(call: Call, q: Array, k: Array, prefix: Any, q_segment: Any, k_segment: Any) -> Bool[Array, "m n"]:
    """The predicate on slots q, k and what belongs to them; all broadcast against each other."""
    ok = allowed(call.pattern, q, k)
    if call.arrays.prefix:
        ok = ok | (k < prefix)
    if call.S % call.block_k:
        ok = ok & (k < call.S)
    if call.arrays.k_segment:
        ok = ok & (k_segment != 0)
        if call.arrays.q_segment:
            ok = ok & (q_segment == k_segment)
    return ok


def dot(a: Array, b: Array, dims: Any = (((1,), (0,)), ((), ()))) -> Float[Array, "m n"]:
    """Matmul with a float32 result; float32 inputs are not rounded."""
    return lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def scores(call: Call, raw: Array) -> tuple[Array, Array | None]:
    """Scores times log2(e) from products with folded q, and the tanh where there is a soft-cap."""
    if call.softcap is None:
        return raw, None
    t = jnp.tanh(raw)
    return t * (call.softcap * LOG2_E), t
