"""Optax AdamW with decoupled decay on matrices, and the warm-up + cosine schedule."""

from __future__ import annotations

import optax

from jaxllm.experiment import Optimizer
from jaxllm.params import Normal, ParamTree, map_params


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
    return optax.chain(
        optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(schedule(cfg)),
    )
