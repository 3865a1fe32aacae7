"""Feed-forward layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal[
    "relu", "gelu", "gelu_tanh", "gelu_quick", "silu", "sigmoid", "tanh", "relu2", "leaky_relu", "identity"
]


@dataclass(frozen=True)
class MLP:
    """down(act(up(x)))."""

    hidden: int
    act: Activation = "gelu"
    bias: bool = False


@dataclass(frozen=True)
class GLU:
    """down(act(gate(x)) * (up(x) + offset)) (Shazeer 2020): SwiGLU with silu, GeGLU with gelu.

    `limit` c: gate(x) is cut to at most c and up(x) to [-c, c] before (GPT-OSS, with offset 1). `beta` b: act(b x) / b
    in place of act(x), Swish's own parameter (Ramachandran et al. 2017; GPT-OSS: 1.702).
    """

    hidden: int
    act: Activation = "silu"
    bias: bool = False
    limit: float | None = None
    offset: float = 0.0
    beta: float = 1.0


@dataclass(frozen=True)
class Router:
    """Which `top_k` of the experts a token goes to, and with what weights.

    scores = softmax or sigmoid of a linear map (with `bias` in it). With `correction` a vector that gradients do not
    train is added for the choice alone (DeepSeek-V3, §2.1.2). With `groups` only experts of the `top_groups` best
    groups are chosen, a group counting as its best expert, or with `group_score` "top2" as the sum of its best two.
    Weights are the chosen scores, divided by their sum if `renormalise`, times `scale`.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["best", "top2"] = "best"


@dataclass(frozen=True)
class MoE:
    """A sparse mixture of experts (Shazeer et al. 2017): every token goes through `router.top_k` of `experts`.

    `shared`: an FFN that every token goes through as well; with `shared_gate` times sigmoid of a linear map to one.
    `capacity` c: an expert takes at most c * tokens * top_k / experts tokens of a row, first come first served, and
    drops the others (Switch, Fedus et al. 2021, §2.2); None: dropless.
    """

    expert: MLP | GLU
    experts: int
    router: Router
    shared: MLP | GLU | None = None
    shared_gate: bool = False
    capacity: float | None = None

    def __post_init__(self) -> None:
        r = self.router
        if not 1 <= r.top_k <= self.experts:
            raise ValueError(f"MoE: top_k={r.top_k} must be in 1..{self.experts}, the number of experts")
        if self.experts % r.groups or not 1 <= r.top_groups <= r.groups:
            raise ValueError(
                f"MoE: experts={self.experts} must split into groups={r.groups}, top_groups={r.top_groups} of them"
            )
        if r.top_k > self.experts // r.groups * r.top_groups:
            raise ValueError(
                f"MoE: top_k={r.top_k} is more than the {self.experts // r.groups * r.top_groups} experts of the "
                f"top_groups={r.top_groups} chosen groups"
            )


FFN = MLP | GLU | MoE
