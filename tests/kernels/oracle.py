"""Attention and its gradient as naive float64 numpy: a query at a time, keys picked by indexing, no mask value."""

from __future__ import annotations

import numpy as np

from jaxllm import config


def meets(pattern: config.Pattern, q: int, k: int) -> bool:
    """Whether query slot q sees key slot k, written out apart from the code under test."""
    match pattern:
        case config.Full():
            return True
        case config.Causal():
            return k <= q
        case config.Local(window):
            return abs(q - k) < window
        case config.And(left, right):
            return meets(left, q, k) and meets(right, q, k)
        case config.Or(left, right):
            return meets(left, q, k) or meets(right, q, k)


def dense(pattern, mask, B, T, S):
    """bool [B, T, S]."""
    q_slot = np.broadcast_to(np.arange(T), (B, T)) if mask.q_slot_BT is None else np.asarray(mask.q_slot_BT)
    k_slot = np.broadcast_to(np.arange(S), (B, S)) if mask.k_slot_BS is None else np.asarray(mask.k_slot_BS)
    low, high = int(min(q_slot.min(), k_slot.min())), int(max(q_slot.max(), k_slot.max())) + 1
    table = np.array([[meets(pattern, q, k) for k in range(low, high)] for q in range(low, high)])
    ok = table[q_slot[:, :, None] - low, k_slot[:, None, :] - low]
    if mask.prefix_B is not None:
        ok |= k_slot[:, None, :] < np.asarray(mask.prefix_B)[:, None, None]
    if mask.k_segment_BS is not None:
        k_segment = np.asarray(mask.k_segment_BS)
        ok &= k_segment[:, None, :] > 0
        if mask.q_segment_BT is not None:
            ok &= np.asarray(mask.q_segment_BT)[:, :, None] == k_segment[:, None, :]
    return ok


def attend(q, k, v, do, pattern, mask, scale, softcap):
    """(o, dq, dk, dv) of sum(o * do), all float64."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    (B, T, N), (S, K) = q.shape[:3], k.shape[1:3]
    ok = dense(pattern, mask, B, T, S)
    o, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, t in np.ndindex(B, T):
        (seen,) = np.nonzero(ok[b, t])
        if not len(seen):
            continue
        for n in range(N):
            keys, values = k[b, seen, n // (N // K)], v[b, seen, n // (N // K)]
            s = scale * keys @ q[b, t, n]
            slope = np.ones_like(s)
            if softcap is not None:
                slope = 1 / np.cosh(s / softcap) ** 2
                s = softcap * np.tanh(s / softcap)
            p = np.exp(s - s.max())
            p /= p.sum()
            o[b, t, n] = p @ values
            ds = p * (values @ do[b, t, n] - do[b, t, n] @ o[b, t, n]) * slope * scale
            dq[b, t, n] = ds @ keys
            dk[b, seen, n // (N // K)] += np.outer(ds, q[b, t, n])
            dv[b, seen, n // (N // K)] += np.outer(p, do[b, t, n])
    return o, dq, dk, dv
