"""Vision towers, what joins them to a text model, and the two kinds of model that are made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxllm.config.attention import GQA
from jaxllm.config.ffn import Activation
from jaxllm.config.models import Cross, Stack, Transformer
from jaxllm.config.norms import Norm
from jaxllm.config.positions import Rope


@dataclass(frozen=True)
class Patches:
    """How images are cut: cubes of `size` x `size` pixels and `frames` pictures, each mapped linearly to a vector.

    (A convolution whose stride is its kernel.) A patch is flat in the order channels, frames, rows, columns.
    """

    size: int
    channels: int = 3
    frames: int = 1
    bias: bool = False

    @property
    def width(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.frames * self.size**2


@dataclass(frozen=True)
class Vision:
    """A vision tower: patches, stacks of ordinary blocks that see both ways, features.

    side: images are squares of so many patches a side, with a learned vector per place (CLIP); None: they are of any
        size, and attention rotates by (row, column) (Qwen2-VL).
    table: side of the learned table when it is another than `side`; it is resized, bicubic (Qwen-VL).
    class_token: a learned vector stands before the patches.  embed_norm: before the first layer.
    norm: after the last layer; None: there is none.
    features: after how many of the stacks the features are taken, without `norm`; several are concatenated. None: after
        all of them, normalised. Stacks behind are kept, since checkpoints hold them, and are not run.
    keep_class: whether the class token is one of the features.
    merge: patches come in blocks of merge x merge.  window: the side, in such blocks, of the windows within which
        layers with `GQA.windowed` attend.
    """

    dim: int
    stacks: tuple[Stack, ...]
    patches: Patches
    side: int | None = None
    table: int | None = None
    class_token: bool = False
    embed_norm: Norm | None = None
    norm: Norm | None = None
    features: tuple[int, ...] | None = None
    keep_class: bool = True
    merge: int = 1
    window: int | None = None

    def __post_init__(self) -> None:
        windowed = any(isinstance(b.attn, GQA) and b.attn.windowed for s in self.stacks for b in s.pattern)
        if windowed and self.window is None:
            raise ValueError("Vision: layers are windowed, but window is None; give the windows' side in merged blocks")
        if self.side is None and self.class_token:
            raise ValueError("Vision: class_token=True needs images of one size; give side, in patches")

    @property
    def layers(self) -> int:
        """Number of blocks in all stacks."""
        return sum(stack.layers for stack in self.stacks)

    @property
    def width(self) -> int:
        """Width of a feature."""
        return self.dim * (1 if self.features is None else len(self.features))


# --------------------------------------------------------------------------------------------------------- adapters


@dataclass(frozen=True)
class Projector:
    """down(act(up(x))), from the tower's width to the text's and on (LLaVA 1.5, Liu et al. 2023)."""

    act: Activation = "gelu"
    bias: bool = True


@dataclass(frozen=True)
class Merger:
    """norm(x), then the merge x merge patches of a block side by side through two layers (Qwen2-VL)."""

    norm: Norm
    act: Activation = "gelu"


@dataclass(frozen=True)
class QFormer:
    """`queries` learned vectors through blocks that also attend to the features (BLIP-2, Li et al. 2023, §3.1).

    They start normalised by `norm`; a projection to the text's width follows.
    """

    queries: int
    dim: int
    stacks: tuple[Stack, ...]
    norm: Norm


@dataclass(frozen=True)
class Resampler:
    """side x side learned queries attend once to the features (Qwen-VL, Bai et al. 2023, §2.1).

    Queries and keys, not values, are told their places by 2-D sinusoids. `norm` is that of queries, features (after a
    projection to the width of `cross`), and results, which a last square matrix maps.
    """

    side: int
    cross: Cross
    norm: Norm

    def __post_init__(self) -> None:
        if self.cross.dim % 4:
            raise ValueError(f"Resampler: 2-D sinusoids need a width that is a multiple of 4, found {self.cross.dim}")


Adapter = Projector | Merger | QFormer | Resampler

# ----------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class TwoTower:
    """Texts and images in one space of width `dim`, compared by the cosine of their angle (CLIP, Radford et al. 2021).

    A text is read at its first `eos` token (None: at its largest id, as the first release did), an image at its class
    token. `log_scale`: where the learned log of the inverse temperature starts.
    """

    text: Transformer
    vision: Vision
    dim: int
    eos: int | None
    log_scale: float = 2.6592
    name: str = field(default="two_tower", compare=False)

    def __post_init__(self) -> None:
        if not self.vision.class_token:
            raise ValueError("TwoTower: an image is read at its class token; set vision.class_token=True")

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self.text.vocab

    @property
    def context(self) -> int:
        """The longest text."""
        return self.text.context


@dataclass(frozen=True)
class VisionLanguage:
    """A text model in which the vectors of `image_token` (and `video_token`) are replaced by adapted image features.

    When the text's rotations have `sections`, positions are those of M-RoPE: time, row, column.
    tokens_per_second: how many temporal positions a second of video takes (Qwen2.5-VL); None: one per step of frames.
    """

    text: Transformer
    vision: Vision
    adapter: Adapter
    image_token: int
    video_token: int | None = None
    tokens_per_second: float | None = None
    name: str = field(default="vision_language", compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.adapter, Resampler) and self.adapter.cross.dim != self.text.dim:
            raise ValueError(f"Resampler: its width {self.adapter.cross.dim} must be the text's {self.text.dim}")

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self.text.vocab

    @property
    def context(self) -> int:
        """The longest text, features included."""
        return self.text.context

    @property
    def mrope(self) -> bool:
        """Whether positions have three axes."""
        attns = (block.attn for stack in self.text.stacks for block in stack.pattern)
        return any(isinstance(a.position, Rope) and a.position.sections is not None for a in attns)
