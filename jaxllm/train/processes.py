"""One process decides for all: what is restored, when to stop, whether there is room."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def decided_by_first(decide: Callable[[], Any]) -> Any:
    """`decide()`, evaluated by process 0 alone; its JSON result, ValueError or OSError reaches every process.

    A collective: all processes must call it at the same place.
    """
    if jax.process_count() == 1:
        return decide()
    verdict: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            verdict = {"value": decide()}
        except ValueError as error:
            verdict = {"value_error": str(error)}
        except OSError as error:
            verdict = {"os_error": str(error)}
    match _broadcast(verdict):
        case {"value": value}:
            return value
        case {"value_error": str(text)}:
            raise ValueError(text)
        case {"os_error": str(text)}:
            raise OSError(text)
        case other:
            raise AssertionError(f"process 0 broadcast {other!r}")


def _broadcast(value: Any) -> Any:
    """Process 0's JSON, on all: its length first, then its bytes, padded to 1 KiB so that few programs are compiled."""
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with jax.transfer_guard("allow"):
        size = int(multihost_utils.broadcast_one_to_all(np.int32(raw.size)))
        padded = np.resize(raw, -(-size // 1024) * 1024)
        return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].astype(np.uint8)))
