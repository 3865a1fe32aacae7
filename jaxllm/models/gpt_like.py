"""What GPT's descendants share: equal layers with LayerNorm, and the rows of their name tables.

A linear layer is stored [out, in] with its bias beside it. Three kinds of attention tensors occur:

    projections   q, k and v apart
    joined        q, k and v one after the other: "(X H) D"
    grouped       per kv head its queries, then its key, then its value: "(K X H) D", K in the table's `sizes`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from jaxllm.config import GLU, GQA, MLP, Block, LayerNorm, Transformer
from jaxllm.models.common import Config, Row, foreign, layers_of, table
from jaxllm.models.rope import modern
from jaxllm.rules import Rule, Unused

Rows = tuple[Row, ...]
F = TypeVar("F", MLP, GLU)


def linear(name: str, path: str | tuple[str, ...], weight: str, bias: str | None = None) -> Rows:
    """A linear layer's weight and bias, and their layouts."""
    paths = path if isinstance(path, tuple) else (path,)
    kernels, biases = tuple(f"{p}/kernel" for p in paths), tuple(f"{p}/bias" for p in paths)
    return (f"{name}.weight", kernels, weight), (f"{name}.bias", biases, bias)


def norm(name: str, path: str) -> Rows:
    """A LayerNorm's weight and bias."""
    return (f"{name}.weight", f"{path}/scale", None), (f"{name}.bias", f"{path}/bias", None)


def head(name: str) -> Rows:
    """The language-model head's weight and bias."""
    return (f"{name}.weight", "head/kernel", None), (f"{name}.bias", "head/bias", None)


def output(name: str) -> Rows:
    """Attention's output projection."""
    return linear(name, "attn/o", "D (N H) -> N H D")


def projections(at: str, out: str) -> Rows:
    """Attention with q_proj, k_proj and v_proj under `at`, and the output projection `out` there."""
    q = linear(f"{at}.q_proj", "attn/q", "(N H) D -> D N H", "(N H) -> N H")
    k = linear(f"{at}.k_proj", "attn/k", "(K H) D -> D K H", "(K H) -> K H")
    v = linear(f"{at}.v_proj", "attn/v", "(K H) D -> D K H", "(K H) -> K H")
    return q + k + v + output(f"{at}.{out}")


QKV = ("attn/q", "attn/k", "attn/v")


def joined(name: str, out: str) -> Rows:
    """Attention whose tensor `name` is q, k and v one after the other."""
    return linear(name, QKV, "(X H) D -> D X H", "(X H) -> X H") + output(out)


def grouped(name: str, out: str) -> Rows:
    """Attention whose tensor `name` goes by kv head; see the module."""
    return linear(name, QKV, "(K X H) D -> D (K X) H", "(K X H) -> (K X) H") + output(out)


def feed_forward(up: str, down: str) -> Rows:
    """An MLP."""
    return linear(up, "ffn/up", "F D -> D F") + linear(down, "ffn/down", "D F -> F D")


def names_with(spec: Transformer, top: Rows, prefix: str, block: Rows, alias: str = "lm_head.weight") -> list[Rule]:
    """The table of these rows; old files also hold causal masks and frequency tables."""
    attn = layers_of(spec)[0].attn
    sizes = (("K", attn.kv_heads),) if isinstance(attn, GQA) else ()
    rules = table(spec, top, prefix, block, alias, sizes)
    return [*rules, Unused("*.attention.bias"), Unused("*.attn.bias"), Unused("*.masked_bias"), Unused("*.inv_freq")]


# --------------------------------------------------------------------------------------------------------- configs


def published(from_hf: Callable[[Config], Transformer], name: str, **config: Any) -> Transformer:
    """The spec of a published config.json, by a name of its own."""
    return replace(from_hf(modern(config)), name=name)


def head_width(dim: int, heads: int) -> int:
    """dim / heads. Raises ValueError when it is not whole."""
    if dim % heads:
        raise ValueError(f"config.json: the width {dim} must be a multiple of the {heads} attention heads; correct it")
    return dim // heads


def first_layer(family: str, spec: Transformer, kind: type[F]) -> tuple[Block, GQA, F, LayerNorm]:
    """The first layer, its attention, its feed-forward layer of this kind, its norm. Raises the `foreign` error."""
    block = layers_of(spec)[0]
    if not (isinstance(block.attn, GQA) and isinstance(block.ffn, kind) and isinstance(block.norm, LayerNorm)):
        raise foreign(family, spec)
    return block, block.attn, block.ffn, block.norm


def written(model_type: str, architecture: str, fields: Config, values: tuple[Any, ...]) -> dict[str, Any]:
    """A config.json of `values`, in the order of `fields`."""
    return {"model_type": model_type, "architectures": [architecture]} | dict(zip(fields, values, strict=True))
