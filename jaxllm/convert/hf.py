"""Hugging Face folders: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from jaxllm import rules
from jaxllm.architectures import Spec, model_params
from jaxllm.convert.safetensors_io import open_folder, write_folder
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.leaves import is_weight
from jaxllm.models.families import Family, family_of_config, family_of_spec, renamed, settled, spec_of_config
from jaxllm.models.rope import classic

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def read_config(path: epath.PathLike) -> dict[str, Any]:
    """The config.json of a folder. Raises FileNotFoundError, or ValueError when it is no JSON object."""
    file = epath.Path(path) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; a model folder has config.json, safetensors and a tokenizer")
    try:
        return dict(json.loads(file.read_text()).items())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: must hold a JSON object ({error}); copy the file again") from error


def load_folder(
    path: epath.PathLike, dtype: DTypeLike = "float32", shardings: Any = None
) -> tuple[Spec, Any, Tokenizer | None]:
    """(spec, params, tokenizer) of a folder; the tokenizer is None when the folder has none.

    shardings: a tree like `model_params(spec)`: tensors are read one by one straight into their local shards.
    Config, names and shapes are checked before anything is allocated. Raises ValueError or FileNotFoundError naming
    the field, the tensor or the file.
    """
    config = read_config(path)
    family, tokenizer = family_of_config(config), load_tokenizer(path)
    spec = settled(family, spec_of_config(config), open_folder(path).shapes)
    check_vocab(tokenizer, spec, str(path))
    return spec, load_params(path, spec, family, dtype, shardings), tokenizer


def spec_of_folder(path: epath.PathLike) -> Spec:
    """The spec alone, from config.json and, where there are weights, their names."""
    config = read_config(path)
    spec, held = spec_of_config(config), any(epath.Path(path).glob("*.safetensors"))
    return settled(family_of_config(config), spec, open_folder(path).shapes) if held else spec


def load_params(path: epath.PathLike, spec: Spec, family: Family, dtype: DTypeLike, shardings: Any = None) -> Any:
    """The weights of a folder as parameters of `spec`."""
    folder, table, tree = open_folder(path), family.names(spec), model_params(spec)
    own = {renamed(family, name): name for name in folder.shapes}
    theirs = {name: own[found] for name, found in rules.match_names(table, tree, own, family.PREFIX).items()}
    found = {name: folder.shapes[there] for name, there in theirs.items()}
    rules.check(table, tree, found, str(path))
    return rules.load(table, tree, found, lambda name: folder.read(theirs[name]), dtype, shardings)


def load_tokenizer(path: epath.PathLike) -> Tokenizer | None:
    """The folder's tokenizer, None when it has no tokenizer file."""
    has_one = any((epath.Path(path) / name).exists() for name in TOKENIZER_FILES)
    return tokenizers.load(path) if has_one else None


def check_vocab(tokenizer: Tokenizer | None, spec: Spec, owner: str) -> None:
    """ValueError unless every id of the tokenizer has a row in the embedding."""
    if tokenizer is not None and tokenizer.vocab > spec.vocab:
        raise ValueError(
            f"{owner}: the tokenizer has {tokenizer.vocab} ids, the model's vocabulary {spec.vocab}; they do not "
            "belong together, use the tokenizer that the model was made with"
        )


def eos_ids(path: epath.PathLike, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that ends a text, by generation_config.json or else config.json."""
    file = epath.Path(path) / "generation_config.json"
    named = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids = config.get("eos_token_id") if named is None else named
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def save_folder(
    path: epath.PathLike,
    spec: Spec,
    params: Any,
    tokenizer: Tokenizer | None = None,
    *,
    style: Literal["classic", "modern"] = "classic",
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write what the reference's `from_pretrained` reads, in the parameters' own dtype.

    Quantised and adapted weights are written dense, in float32.  style: "classic" writes config.json as transformers 4
    does (5 reads it too), "modern" as 5 does.  shard_bytes: the largest safetensors file. The folder appears when it is
    whole. Raises ValueError when no family's config.json expresses the spec exactly, FileExistsError for a used folder.
    """
    family, config = family_of_spec(spec)
    dtype, table = _dtype_of(params), family.names(spec)
    with new_folder(path) as folder:
        shapes = rules.wanted(table, model_params(spec))
        write_folder(folder, shapes, rules.export(table, params, dtype), dtype, shard_bytes)
        write_extras(folder, config, dtype, tokenizer, style)


@contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """A temporary folder that gets the name `path` when the block ends well, and is removed when it does not.

    Raises FileExistsError when `path` is a folder that holds something.
    """
    folder = epath.Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; give a new folder")
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        if temporary.exists():
            temporary.rmtree()
        raise


def write_extras(
    folder: epath.Path,
    config: Mapping[str, Any],
    dtype: np.dtype,
    tokenizer: Tokenizer | None,
    style: Literal["classic", "modern"] = "classic",
) -> None:
    """config.json in either style, with the tokenizer's special ids, and the tokenizer's files."""
    whole = {"dtype": dtype.name} | _special_ids(tokenizer) | dict(config)
    (folder / "config.json").write_text(json.dumps(classic(whole) if style == "classic" else whole, indent=2))
    if tokenizer is not None:
        tokenizer.save(folder)


def _dtype_of(params: Any) -> np.dtype:
    found = jax.tree.leaves(
        jax.tree.map(lambda w: "float32" if is_weight(w) else w.dtype.name, params, is_leaf=is_weight)
    )
    if len(set(found)) > 1:
        raise ValueError(f"save_folder: all weights must have one dtype, found {sorted(set(found))}; cast them first")
    return np.dtype(found[0])


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Ids by role; None where there is none, lest the reference take its class's default."""
    return {f"{role}_token_id": getattr(tokenizer, role, None) for role in ("bos", "eos", "pad")}
