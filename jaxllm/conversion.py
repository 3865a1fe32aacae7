"""`jaxllm convert`: a stored model as a Hugging Face folder, or as a run directory of ours.

Tensor files are streamed: beside the tensor being written, one tensor of the source is held (of ours, a checkpoint is
read whole). Everything that can be checked is checked before the first byte is written, and what is written appears
under its name once it is whole.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import track

from jaxllm import rules, serial
from jaxllm.architectures import Spec, model_params
from jaxllm.config import Transformer
from jaxllm.convert import gguf, hf, translate
from jaxllm.convert.safetensors_io import open_folder, write_folder
from jaxllm.convert.translate import Piece, Translation
from jaxllm.data.gguf_tokenizer import from_gguf
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.experiment import Data, Experiment
from jaxllm.model import GGUFFile, HuggingFaceFolder, Run, load, locate
from jaxllm.models.families import family_of_config
from jaxllm.params import count, map_with_paths, paths
from jaxllm.records import TrainState
from jaxllm.train.checkpoint import CHECKPOINTS, Checkpointer

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Opened:
    """A source whose names and shapes are checked and whose weights are not read yet.

    dtype: its own; None when its tensors have several.  generation: its generation_config.json, if it has one.
    """

    spec: Spec
    piece: Piece
    tokenizer: Tokenizer | None
    dtype: np.dtype | None
    generation: epath.Path | None = None


def convert(
    source: epath.PathLike,
    target: epath.PathLike,
    to: Literal["hf", "native"],
    *,
    family: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    console: Console | None = None,
) -> Spec:
    """Write the model `source` (whatever `load` opens) to the new folder `target`; returns the spec as written.

    family: the config.json to write; the model must be an equal function in it (`translate.nearest`).  dtype: of the
    weights; None: the source's own.  Raises ValueError, FileNotFoundError, FileExistsError.
    """
    opened = _opened(source)
    wanted = np.dtype(dtype) if dtype is not None else opened.dtype
    if wanted is None:
        raise ValueError(f"{source}: its tensors have several dtypes; choose one with --dtype")
    match to:
        case "hf":
            return _to_hf(opened, target, family, wanted, shard_bytes, console)
        case "native":
            if family is not None:
                raise ValueError(f"--family {family} is for --to hf; a run directory of ours holds any spec as it is")
            return _to_native(opened, target, wanted, console)
        case other:
            assert_never(other)


def _opened(source: epath.PathLike) -> Opened:
    match locate(source):
        case HuggingFaceFolder(path):
            return _opened_folder(path)
        case GGUFFile(path):
            file = gguf.open_gguf(path)
            spec, tokenizer = gguf.spec_from_gguf(file), from_gguf(file.metadata)
            tree, table = model_params(spec), gguf.names(spec)
            rules.check(table, tree, file.shapes, str(path))
            return Opened(spec, translate.pieces(table, tree, file.read), tokenizer, np.dtype("float32"))
        case Run():
            model = load(source)
            return Opened(model.spec, translate.pieces_of(model.params), model.tokenizer, np.dtype("float32"))
        case other:
            assert_never(other)


def _opened_folder(path: epath.Path) -> Opened:
    family, folder, spec = family_of_config(hf.read_config(path)), open_folder(path), hf.spec_of_folder(path)
    tokenizer = hf.load_tokenizer(path)
    hf.check_vocab(tokenizer, spec, str(path))
    table, tree = family.names(spec), model_params(spec)
    theirs = rules.match_names(table, tree, folder.shapes, family.PREFIX)
    found = {name: folder.shapes[own] for name, own in theirs.items()}
    rules.check(table, tree, found, str(path))
    rules.check_aliases(table, found, lambda name: folder.read(theirs[name]))
    dtypes = {folder.tensors[theirs[name]].dtype for name in rules.wanted(table, tree)}
    known = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    dtype = jnp.dtype(known[dtypes.pop()]) if len(dtypes) == 1 and dtypes <= known.keys() else None
    generation = path / GENERATION if (path / GENERATION).exists() else None
    piece = translate.pieces(table, tree, lambda name: folder.read(theirs[name]))
    return Opened(spec, piece, tokenizer, dtype, generation)


def _to_hf(
    opened: Opened,
    target: epath.PathLike,
    name: str | None,
    dtype: np.dtype,
    shard_bytes: int,
    console: Console | None,
) -> Spec:
    family, config, spec = translate.nearest(opened.spec, name)
    translation = Translation(opened.spec, spec, opened.piece)
    translation.check()
    table = family.names(spec)
    shapes = rules.wanted(table, model_params(spec))
    with hf.new_folder(target) as folder:
        stream = _shown(translate.export(table, translation, dtype), len(shapes), console)
        write_folder(folder, shapes, stream, dtype, shard_bytes)
        hf.write_extras(folder, config, dtype, opened.tokenizer)
        if opened.generation is not None:
            (folder / GENERATION).write_text(opened.generation.read_text())
    return spec


def _to_native(opened: Opened, target: epath.PathLike, dtype: np.dtype, console: Console | None) -> Spec:
    """A run directory at step 0, from which `load` and training by `Experiment` start."""
    spec, tree = opened.spec, model_params(opened.spec)
    if not isinstance(spec, Transformer):
        raise ValueError(f"--to native: a run directory holds a Transformer, found {type(spec).__name__}; use --to hf")
    with hf.new_folder(target) as folder:
        names = [path for path, _ in paths(tree)]
        arrays = {
            path: jnp.asarray(translate.narrowed(path, opened.piece(path, ()), dtype))
            for path in _shown(names, len(names), console)
        }
        params = map_with_paths(lambda path, _: arrays[path], tree)
        exp = Experiment(spec, Data((), spec.context), steps=1, batch_size=1, run_dir=str(target))
        (folder / "config.json").write_text(serial.dumps(exp))
        if opened.tokenizer is not None:
            opened.tokenizer.save(folder / "tokenizer")
        with Checkpointer(folder / CHECKPOINTS) as saver:
            saver.save(TrainState(jnp.zeros((), jnp.int32), params, {}, {}))
    return spec


def _shown(items: Iterable[Any], total: int, console: Console | None) -> Iterator[Any]:
    """The items, with a progress bar in a terminal."""
    quiet = console is None or not console.is_terminal
    return iter(track(items, "tensors", total=total, console=console, disable=quiet))


def convert_command(args: argparse.Namespace) -> int:
    """Write a model in another format, or as another family; tensors are streamed."""
    console = Console(stderr=True)
    options = {"family": args.family, "dtype": args.dtype, "shard_bytes": size_of(args.shard_size)}
    spec = convert(args.source, args.target, args.to, console=console, **options)
    print(f"{args.target}: {spec.name}, {count(model_params(spec)):,} parameters")
    return 0


def size_of(text: str) -> int:
    """Bytes of "5GB", "500MB" or a plain number. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = 0 if found is None else int(float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " "))
    if size < 1:
        raise ValueError(f"--shard-size {text}: must be a number of bytes above 0, such as 5GB or 500MB")
    return size
