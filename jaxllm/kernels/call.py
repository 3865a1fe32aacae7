"""What the flash kernels of all devices share: the static side of a call, its operands, scores and their mask."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm import config
from jaxllm.kernels.reference import MASKED, Names, precision
from jaxllm.kernels.schedule import Arrays, Schedule, Shape, choose
from jaxllm.records import Mask
from jaxllm.remat import named_attention

LANES = 128  # queries lie along them
LOG2_E = math.log2(math.e)


class Part(NamedTuple):
    """A piece of a longer attention: some of the keys, for some of the queries, slots counted from the first of each.

    Every kernel has for it `part_forward` (its result and the log-sum-exp of its rows, MASKED where no key is seen) and
    `part_backward` (its share of the gradients, given the result and the log-sum-exp over all keys). Heads come first:
    q, o [B, N, T, H], k, v [B, K, S, H], log-sum-exp [B, N, T].
    """

    pattern: config.Pattern
    mask: Mask
    scale: float
    softcap: float | None


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
        grain = LANES if tile_q % LANES == 0 else tile_q
        return Shape(self.T, self.S, self.block_q, self.block_k, tile_q, tile_k, grain)


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
    """Whole blocks. q: [B, N, T, H]; k, v: [B, K, S, H]."""
    return Operands(
        padded(q, call.block_q),
        padded(k, call.block_k),
        padded(v, call.block_k),
        _row(mask.q_segment_BT, call.block_q),
        _row(mask.k_segment_BS, call.block_k),
    )


def _row(segment_BT: Int[Array, "B T"] | None, block: int) -> Int[Array, "B 1 t"] | None:
    if segment_BT is None:
        return None
    return jnp.pad(segment_BT.astype(jnp.int32), ((0, 0), (0, -segment_BT.shape[1] % block)))[:, None]


def result(call: Call, o: Float[Array, "BN t h"]) -> Float[Array, "B T N h"]:
    """Back from heads first."""
    return unpadded(o, call.N, call.T).swapaxes(1, 2)


def part_call(part: Part, q: Array, k: Array, blocks: tuple[int, int], interpret: bool) -> Call:
    """The static side of a kernel that computes `part`."""
    (N, T), (K, S) = q.shape[1:3], k.shape[1:3]
    return Call(part.pattern, part.scale, part.softcap, N, K, T, S, *blocks, arrays_of(part.mask), interpret)


def part_rows(call: Call, lse: Float[Array, "BN t"]) -> Float[Array, "B N T"]:
    """A kernel's log-sum-exp (in powers of two, -MASKED where no key is seen) as `Part` wants it."""
    rows = unpadded(lse[..., None], call.N, call.T)[..., 0]
    return jnp.where(rows < -MASKED / 2, rows / LOG2_E, MASKED)


def kernel_rows(call: Call, lse_BNT: Float[Array, "B N T"]) -> Float[Array, "BN t"]:
    """The inverse, padded to whole blocks with rows that see no key."""
    lse = jnp.where(lse_BNT > MASKED / 2, lse_BNT * LOG2_E, -MASKED).reshape(-1, call.T)
    return jnp.pad(lse, ((0, 0), (0, -call.T % call.block_q)), constant_values=-MASKED)


def padded(x_BNTH: Float[Array, "B N T H"], block: int) -> Float[Array, "BN t H"]:
    """The length padded to whole blocks, batch and heads in one."""
    B, N, T, H = x_BNTH.shape
    return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, -T % block), (0, 0))).reshape(B * N, -1, H)


def saveable(call: Call, o: Float[Array, "BN t h"], lse: Float[Array, "BN t"]) -> tuple[Array, Array]:
    """Both as they are, named for policies. Heads narrower than the 128 lanes of a TPU are saved side by side."""
    (heads, t, h), lanes = o.shape, 128
    if h % lanes == 0:
        return named_attention(o, lse)
    wide = o.reshape(-1, call.N, t, h).swapaxes(1, 2).reshape(-1, t, call.N * h)
    wide, lse = named_attention(wide, lse)
    return wide.reshape(-1, t, call.N, h).swapaxes(1, 2).reshape(heads, t, h), lse


def unpadded(x: Float[Array, "BN t H"], heads: int, length: int) -> Float[Array, "B N T H"]:
    """The inverse of `padded`."""
    return x[:, :length].reshape(-1, heads, length, x.shape[-1])


def codes(call: Call, plan: Schedule, shape: Shape, x: Operands, prefix: Array | None) -> tuple[Array, Array]:
    """`schedule.choose` for these operands."""
    if not any(call.arrays):
        return choose(plan, shape, None)
    rows = [None if s is None else s[:, 0] for s in (x.q_segment, x.k_segment)]
    return choose(plan, shape, Names(None, None, *rows, prefix))  # type: ignore[arg-type]  # slots are implied


def may_meet(call: Call, seen: Array, k: Array, prefix: Any, q_segment: Any, k_segment: Any) -> Bool[Array, "m n"]:
    """What the pattern lets be seen, narrowed or widened by a mask's arrays; all broadcast against key slots k."""
    ok = seen
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
