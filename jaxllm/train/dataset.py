"""From an experiment's `data` to batches on devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Shaped

from jaxllm.data import source as sources
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.corpus import Corpus, Document, LastChars, split
from jaxllm.data.mixture import Mixture, Stage, batch_at
from jaxllm.data.packing import BestFit, Fit, NextFit, Packing
from jaxllm.data.source import Finite, Source
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.data.train_tokenizer import train_tokenizer
from jaxllm.experiment import Data, Experiment
from jaxllm.records import Batch
from jaxllm.train.processes import decided_by_first

Say = Callable[[str], None]


@dataclass(frozen=True)
class Dataset:
    """tokenizer, the training mixture, the validation batches (None without held-out text), the channels' names."""

    tokenizer: Tokenizer
    train: Mixture
    validation: Finite | None
    channels: tuple[str, ...]


def prepare(exp: Experiment, say: Say = lambda line: None) -> Dataset:
    """Tokenizer, shards and row plans: made once by process 0, opened by all, found again on resume.

    Raises ValueError when the corpus is missing, empty or binary, or the tokenizer does not fit the model.
    """
    home = epath.Path(exp.run_dir)
    made: list[Dataset] = []
    decided_by_first(lambda: made.append(_prepare(exp, home, say)))
    return made[0] if made else _prepare(exp, home, lambda line: None)


def _prepare(exp: Experiment, home: epath.Path, say: Say) -> Dataset:
    corpora = [_documents(exp.data, i) for i in range(len(exp.data.sources))]
    tokenizer = _tokenizer(exp, home / "tokenizer", [d.text for train, _ in corpora for d in train], say)
    packing = Packing(exp.data.context, _fit(exp.data))
    cache = home / "data" if exp.data.cache_dir is None else epath.Path(exp.data.cache_dir)

    def make(name: str, documents: list[Document]) -> Source:
        return sources.prepare(name, documents, tokenizer, cache / name, packing, progress=say)

    train = [make(f"train{i}", documents) for i, (documents, _) in enumerate(corpora)]
    weights = tuple(s.weight for s in exp.data.sources)
    mixture = Mixture(tuple(train), (Stage(0, exp.batch_size, weights),), exp.seed)
    held_out = [document for _, documents in corpora for document in documents]
    validation = None
    if held_out:
        rows = make("validation", held_out).with_channels(mixture.channels)
        validation = Finite(rows, exp.batch_size // exp.accumulate)
    return Dataset(tokenizer, mixture, validation, mixture.channels)


def _documents(data: Data, i: int) -> tuple[list[Document], list[Document]]:
    """(training, held out) documents of one source. Only the first source gives validation text."""
    documents = list(Corpus(data.sources[i].path))
    if i == 0 and data.held_out_chars:
        return split(documents, LastChars(data.held_out_chars))
    return documents, []


def _fit(data: Data) -> Fit:
    return NextFit() if data.packing == "greedy" else BestFit()


def _tokenizer(exp: Experiment, home: epath.Path, texts: list[str], say: Say) -> Tokenizer:
    choice = exp.data.tokenizer
    if (home / "tokenizer_config.json").exists():  # written last
        tokenizer = tokenizers.load(home)
    elif choice.path is None:
        tokenizer = train_tokenizer(texts, exp.model.vocab, choice.kind, progress=say)
        tokenizer.save(home)
    else:
        tokenizer = tokenizers.load(choice.path)
        tokenizer.save(home)
    if tokenizer.vocab > exp.model.vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab} ids and the model's vocabulary {exp.model.vocab}: every id needs a "
            f"row; set model.vocab={tokenizer.vocab}, or choose the tokenizer that the model was made with"
        )
    return tokenizer


# ----------------------------------------------------------------------------------------------------- to devices


def rows_here(rows: int, sharding: NamedSharding) -> slice:
    """The rows of a global [rows, T] array that this process holds."""
    by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    held: Any = by_row.addressable_devices_indices_map((rows, 1))
    spans = [index[0].indices(rows)[:2] for index in held.values()]
    return slice(min(lo for lo, _ in spans), max(hi for _, hi in spans))


def to_devices(rows: int, sharding: NamedSharding, part: slice, batch: Batch) -> Batch:
    """The global batch [rows, T] as jax arrays, from this process's `part` of it (numpy)."""

    def place(x: Shaped[np.ndarray, "part ..."]) -> Shaped[jax.Array, "rows ..."]:
        shape = (rows, *x.shape[1:])

        def piece(index: Any) -> np.ndarray:
            lo, hi, _ = index[0].indices(rows)
            return x[lo - part.start : hi - part.start, *index[1:]]

        return jax.make_array_from_callback(shape, sharding, piece)

    with jax.transfer_guard("allow"):
        return jax.tree.map(place, batch)


def train_batch(mixture: Mixture, step: int, sharding: NamedSharding) -> Batch:
    """The global batch of a step on devices; each process reads only its own rows."""
    rows = mixture.batch_size(step)
    part = rows_here(rows, sharding)
    return to_devices(rows, sharding, part, batch_at(mixture, step, part))


def validation_batch(finite: Finite, i: int, sharding: NamedSharding) -> Batch:
    """Validation batch i on devices."""
    part = rows_here(finite.batch_size, sharding)
    return to_devices(finite.batch_size, sharding, part, finite.source.batch(finite.rows(i)[part]))
