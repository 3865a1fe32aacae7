"""What stands after the last layer: language-model heads, classifiers, poolers."""

from __future__ import annotations

from typing import Any, assert_never

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import Classifier, LMHead, Transform, Transformer
from jaxllm.leaves import Weight, project
from jaxllm.nn.ffn import ACTIVATIONS, linear, linear_params
from jaxllm.nn.norm import norm, norm_params
from jaxllm.params import Constant, Normal, Param, ParamTree
from jaxllm.runtime import Runtime
from jaxllm.sharding import use

_MATRIX = {2: "BD,DE->BE", 3: "BTD,DE->BTE"}  # by rank


def transform_params(cfg: Transform, dim: int) -> ParamTree:
    """dense/kernel [D, D], dense/bias [D], and norm."""
    tree: ParamTree = {"dense": linear_params({"embed": dim}, {"out": dim}, True)}
    return tree if cfg.norm is None else tree | {"norm": norm_params(cfg.norm, dim)}


def transform(p: Any, cfg: Transform, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """norm(act(dense(x)))."""
    y = ACTIVATIONS[cfg.act](linear(p["dense"], x, _MATRIX[x.ndim]))
    return y if cfg.norm is None else norm(p["norm"], cfg.norm, y)


# --------------------------------------------------------------------------------------------------- language model


def head_params(spec: Transformer) -> ParamTree:
    """kernel [V, d] unless tied, bias [V], transform/...; nothing without a head. d is the embedding's width."""
    cfg = spec.head
    if cfg is None:
        return {}
    width = spec.embed.dim or spec.dim
    tree: ParamTree = {}
    if not cfg.tied:
        tree["kernel"] = Param((spec.vocab, width), ("vocab", "embed"), Normal(width**-0.5))
    if cfg.bias:
        tree["bias"] = Param((spec.vocab,), ("vocab",), Constant(0.0))
    if cfg.transform is not None:
        tree["transform"] = transform_params(cfg.transform, spec.dim)
    if spec.embed.dim is not None:
        tree["projection"] = linear_params({"embed": spec.dim}, {"out": width}, False)
    return tree


def lm_head(spec: Transformer) -> LMHead:
    """The head. Raises ValueError for a spec that has none."""
    if spec.head is None:
        raise ValueError(f"spec {spec.name!r} has no language-model head, so it has no logits; take its hidden states")
    return spec.head


def head_kernel(params: Any, spec: Transformer) -> Weight:
    """The output projection [V, d]: the embedding when tied."""
    return params["embed"]["tokens"] if spec.tied else params["head"]["kernel"]


def features(params: Any, spec: Transformer, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T d"]:
    """What the head's kernel multiplies: hidden states, transformed (BERT) or projected (OPT-350m)."""
    cfg, x = lm_head(spec), hidden_BTD
    if cfg.transform is not None:
        x = transform(params["head"]["transform"], cfg.transform, x)
    return x if spec.embed.dim is None else linear(params["head"]["projection"], x, "BTD,Dd->BTd")


def finish(
    cfg: LMHead, x: Float[Array, "B T d"], kernel: Weight, bias: Float[Array, " V"] | None
) -> Float[Array, "B T V"]:
    """float32 logits of some rows of the kernel: capped, scaled, biased, their rows normalised, as `cfg` says."""
    if cfg.normalised:
        norms = jnp.linalg.norm(kernel.astype(jnp.float32), axis=-1, keepdims=True)  # type: ignore[union-attr]
        kernel = (kernel.astype(jnp.float32) / jnp.maximum(norms, 1e-7)).astype(x.dtype)  # type: ignore[union-attr]
    out = project(x, kernel, "BTD,VD->BTV").astype(jnp.float32)
    out = out if bias is None else out + bias.astype(jnp.float32)[None, None]
    out = out if cfg.scale == 1.0 else out * cfg.scale
    return out if cfg.softcap is None else cfg.softcap * jnp.tanh(out / cfg.softcap)


def logits(
    params: Any, spec: Transformer, hidden_BTD: Float[Array, "B T D"], runtime: Runtime
) -> Float[Array, "B T V"]:
    """float32 [B, T, V]. For losses take `objectives.token_logprobs`, which never holds them all."""
    cfg, x = lm_head(spec), features(params, spec, hidden_BTD)
    declared = Param((spec.vocab, x.shape[-1]), ("vocab", "embed"), Constant(0.0))
    kernel = use({"w": declared}, {"w": head_kernel(params, spec)}, runtime.layout, runtime.compute_dtype)["w"]
    return finish(cfg, x, kernel, params["head"]["bias"] if cfg.bias else None)


# ------------------------------------------------------------------------------------------------------ classifiers


def classifier_params(cfg: Classifier, dim: int) -> ParamTree:
    """out/kernel [D, labels], out/bias [labels], transform/..."""
    tree: ParamTree = {}
    if cfg.labels is not None:
        tree["out"] = linear_params({"embed": dim}, {"labels": cfg.labels}, cfg.bias)
    return tree if cfg.transform is None else tree | {"transform": transform_params(cfg.transform, dim)}


def classify(
    params: Any,
    spec: Transformer,
    name: str,
    hidden_BTD: Float[Array, "B T D"],
    segment_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B *T labels"]:
    """float32 scores of the classifier `name`: [B, labels], or [B, T, labels] for the pool "tokens"; D without labels.

    segment_BT: 0 = padding, which pools leave out. Raises ValueError for an unknown name.
    """
    cfg = dict(spec.classifiers).get(name)
    if cfg is None:
        raise ValueError(f"spec {spec.name!r} has no classifier {name!r}; it has {[n for n, _ in spec.classifiers]}")
    p = params["classifiers"][name]
    x = hidden_BTD if cfg.pool == "tokens" else pool(cfg.pool, hidden_BTD, segment_BT)
    x = x if cfg.transform is None else transform(p["transform"], cfg.transform, x)
    return (x if cfg.labels is None else linear(p["out"], x, _MATRIX[x.ndim])).astype(jnp.float32)


def pool(
    kind: Any, hidden_BTD: Float[Array, "B T D"], segment_BT: Int[Array, "B T"] | None = None
) -> Float[Array, "B D"]:
    """One vector per row: of the "first" slot (padding or not, as the reference), the "last" real token, or the "mean".

    The mean is over real tokens.
    """
    shape = hidden_BTD.shape[:2]
    real = jnp.ones(shape, bool) if segment_BT is None else segment_BT > 0
    match kind:
        case "first":
            return hidden_BTD[:, 0]
        case "last":
            at = shape[1] - 1 - jnp.argmax(real[:, ::-1], 1)
        case "mean":
            weight = real.astype(jnp.float32)[..., None]
            total = (hidden_BTD.astype(jnp.float32) * weight).sum(1)
            return (total / jnp.maximum(weight.sum(1), 1e-9)).astype(hidden_BTD.dtype)
        case other:
            assert_never(other)
    return jnp.take_along_axis(hidden_BTD, at[:, None, None], 1)[:, 0]
