"""Optax AdamW with decoupled decay on matrices, the warm-up + cosine schedule, and what is kept in fewer bits."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

import optax

from jaxllm.experiment import Optimizer
from jaxllm.params import Normal, Param, ParamTree, map_params
from jaxllm.train.moments import coded_bytes, is_matrix, scale_by_adam_8bit


def master_params(cfg: Optimizer, tree: ParamTree) -> ParamTree:
    """The declaration of the masters: the model's, with matrices of layers in the dtype that `cfg` stores them in."""

    def one(p: Param) -> Param:
        return replace(p, stored=cfg.masters) if is_matrix(p) else p

    return map_params(one, tree)


def bytes_of_state(cfg: Optimizer, p: Param) -> tuple[float, float]:
    """Bytes that one number of a parameter takes as a master, and as two moments."""
    master = 2.0 if cfg.masters == "bfloat16" and is_matrix(p) else 4.0
    return master, 2 * coded_bytes(p) if cfg.moments == "int8" else 8.0


def schedule(cfg: Optimizer) -> optax.Schedule:
    """Learning rate at a step: linear from 0 to the peak, then a cosine to `end_fraction` of it at `decay_steps`."""
    if cfg.decay_steps is None:
        raise ValueError("optimizer.decay_steps is None: pass the experiment through `resolve` first")
    return optax.warmup_cosine_decay_schedule(
        0.0, cfg.peak_lr, cfg.warmup_steps, cfg.decay_steps, cfg.peak_lr * cfg.end_fraction
    )


def make_optimizer(cfg: Optimizer, tree: ParamTree) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay (only on what starts random: matrices), learning rate."""
    matrices = map_params(lambda p: isinstance(p.init, Normal), tree)
    match cfg.moments:
        case "float32":
            adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
        case "int8":
            adam = scale_by_adam_8bit(cfg.b1, cfg.b2, cfg.eps, tree)
        case other:
            assert_never(other)
    return optax.chain(
        optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm),
        adam,
        optax.add_decayed_weights(cfg.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(schedule(cfg)),
    )
