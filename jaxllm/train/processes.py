"""One process decides for all: what is restored, whether there is room, when to stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_PAD = 1024


def decided_by_first(decide: Callable[[], Any]) -> Any:
    """`decide()`, evaluated by process 0 alone; its JSON result, ValueError or OSError reaches every process.

    A collective: all processes must call it at the same place. With one process it is a plain call.
    """
    if jax.process_count() == 1:
        return decide()
    match _broadcast(_verdict(decide) if jax.process_index() == 0 else None):
        case {"value": value}:
            return value
        case {"ValueError": str(text)}:
            raise ValueError(text)
        case {"OSError": str(text)}:
            raise OSError(text)
        case other:
            raise AssertionError(f"process 0 broadcast {other!r}")


def _verdict(decide: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": decide()}
    except ValueError as error:
        return {"ValueError": str(error)}
    except OSError as error:
        return {"OSError": str(error)}


def _broadcast(value: Any) -> Any:
    """Process 0's JSON, on all: its length, then its bytes, padded to whole KiB so that few programs are compiled."""
    raw = json.dumps(value).encode()
    with jax.transfer_guard("allow"):
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(raw))))
        padded = np.zeros(-(-size // _PAD) * _PAD, np.uint8)
        padded[: min(size, len(raw))] = np.frombuffer(raw, np.uint8)[:size]
        return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].astype(np.uint8).tobytes())
