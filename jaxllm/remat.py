"""What the backward pass of a block finds saved instead of computing it again: a list of names.

Every product and every attention of a block carries one of `NAMES`. A policy is those that are saved; `ALIASES` name
some lists. A block's input ("stream") is saved whatever the list says, but where nothing is computed again ("none").
What is offloaded lies in the host's memory between the two passes. `checkpointed` is the one place that tells JAX.

Unusual: "attention" is the output *and* the log-sum-exp, named inside of each kernel's forward rule. With the output
alone, its backward pass would run the forward kernel once more.

(Chen et al. 2016; selective: Korthikanti et al. 2022, §5.)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Name = Literal[
    "stream", "query", "key", "value", "latent", "attention", "attention_out", "router", "gate", "up", "down"
]
"""stream: a block's input.  latent: the low ranks of MLA.  attention: its result before the output projection
"attention_out".  router: an expert's scores.  gate, up, down: of a feed-forward layer or of its experts."""

NAMES: tuple[Name, ...] = get_args(Name)
Remat = Literal["none", "full", "dots", "attention"] | tuple[Name, ...]

ALIASES: dict[str, tuple[Name, ...]] = {
    "full": (),
    "attention": ("attention",),
    "dots": tuple(name for name in NAMES if name not in ("stream", "attention")),
}


def saved_names(remat: Remat) -> tuple[Name, ...] | None:
    """The names a policy saves; None for "none", which leaves it to the compiler. Raises ValueError for others."""
    if isinstance(remat, str):
        if remat != "none" and remat not in ALIASES:
            raise ValueError(f"runtime.remat={remat!r} must be one of none, {', '.join(ALIASES)}, or a list of names")
        return ALIASES.get(remat)
    _require_known(remat, "runtime.remat")
    return remat


def require_valid(remat: Remat, offload: tuple[Name, ...]) -> None:
    """Raise ValueError for unknown names, and for an offload where nothing is named to be saved."""
    _require_known(offload, "runtime.offload")
    if saved_names(remat) is None and offload:
        raise ValueError(
            f'runtime.offload={offload}: with remat="none" the compiler chooses what is saved; set runtime.remat to '
            '"full" or a list of names'
        )


def _require_known(names: tuple[str, ...], field: str) -> None:
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{field}: nothing in a block is called {name!r}; {hint}names: {', '.join(NAMES)}")


def named(x: Float[Array, ...], name: Name) -> Float[Array, ...]:
    """x, known to policies by this name."""
    return checkpoint_name(x, name)


def named_attention(o: Float[Array, ...], lse: Float[Array, ...]) -> tuple[Float[Array, ...], Float[Array, ...]]:
    """A kernel's result and log-sum-exp, which are saved together. For forward rules; both must be what is returned."""
    return named(o, "attention"), named(lse, "attention")


def checkpointed(
    f: Callable[..., Any], remat: Remat, offload: tuple[Name, ...], *, prevent_cse: bool
) -> Callable[..., Any]:
    """`f` with a backward pass that saves what the policy names. offload: names kept by the host, listed or not.

    prevent_cse: False inside of a scan, which keeps the two passes apart by itself.
    """
    names, policies = saved_names(remat), jax.checkpoint_policies
    if names is None:
        return f
    wrap = partial(jax.checkpoint, prevent_cse=prevent_cse)
    here = [name for name in names if name not in offload]
    if not offload:
        return wrap(f, policy=policies.save_only_these_names(*here))
    there = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=here,
        names_which_can_be_offloaded=list(offload),
        offload_src="device",
        offload_dst="pinned_host",
    )
    return wrap(f, policy=there)
