"""The model spec: *what* the function is, never how it is computed.

Every type is a small frozen dataclass, hashable, and free of jax, so that a spec can be a static argument of
`jax.jit`, a dictionary key, or a JSON file. Variants form sum types (`Norm = RMSNorm | LayerNorm`) told apart by one
`match` in the room that owns the verb. Absence is `None`.

Dimension key, used in every array name and einsum of the project:

    B batch     T query length   S key length   D model width   N query heads   K kv heads   G = N / K
    H head width   F feed-forward width   V vocabulary   R low rank   L stacked layers   E experts   C capacity
    P pages
"""

from jaxllm.config.attention import GQA, MLA, Attention, Longformer, QKNorm
from jaxllm.config.compound import EncoderDecoder
from jaxllm.config.ffn import FFN, GLU, MLP, Activation, MoE, Router
from jaxllm.config.models import (
    Block,
    Classifier,
    Cross,
    Embedding,
    LMHead,
    Stack,
    Transform,
    Transformer,
    decoder,
    deepnorm,
)
from jaxllm.config.norms import LayerNorm, Norm, RMSNorm
from jaxllm.config.patterns import (
    And,
    BigBird,
    Blocks,
    Causal,
    Columns,
    Dilated,
    Fixed,
    Full,
    GlobalTokens,
    Later,
    Local,
    Or,
    Pattern,
    RandomBlocks,
    Rows,
    Strided,
)
from jaxllm.config.positions import (
    NTK,
    Alibi,
    DynamicNTK,
    Learned,
    Linear,
    Llama3,
    LongRope,
    Position,
    RelativeBias,
    Rope,
    Scaling,
    Sinusoidal,
    Yarn,
)
from jaxllm.config.vision import (
    Adapter,
    Merger,
    Patches,
    Projector,
    QFormer,
    Resampler,
    TwoTower,
    Vision,
    VisionLanguage,
)

__all__ = [
    "FFN",
    "GLU",
    "GQA",
    "MLA",
    "MLP",
    "NTK",
    "Activation",
    "Adapter",
    "Alibi",
    "And",
    "Attention",
    "BigBird",
    "Block",
    "Blocks",
    "Causal",
    "Classifier",
    "Columns",
    "Cross",
    "Dilated",
    "DynamicNTK",
    "Embedding",
    "EncoderDecoder",
    "Fixed",
    "Full",
    "GlobalTokens",
    "LMHead",
    "Later",
    "LayerNorm",
    "Learned",
    "Linear",
    "Llama3",
    "Local",
    "LongRope",
    "Longformer",
    "Merger",
    "MoE",
    "Norm",
    "Or",
    "Patches",
    "Pattern",
    "Position",
    "Projector",
    "QFormer",
    "QKNorm",
    "RMSNorm",
    "RandomBlocks",
    "RelativeBias",
    "Resampler",
    "Rope",
    "Router",
    "Rows",
    "Scaling",
    "Sinusoidal",
    "Stack",
    "Strided",
    "Transform",
    "Transformer",
    "TwoTower",
    "Vision",
    "VisionLanguage",
    "Yarn",
    "decoder",
    "deepnorm",
]
