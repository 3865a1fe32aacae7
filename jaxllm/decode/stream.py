"""Streaming: tokens as they are drawn, and the text they spell.

A few tokens are decoded per dispatch, so that streaming is as fast as `generate` while the reader sees no pauses. The
same seed gives the same tokens as `generate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from jaxllm.cache import Caches, forget
from jaxllm.config import Transformer
from jaxllm.data.tokenizer import Stream, Tokenizer
from jaxllm.decode.layout import spread
from jaxllm.decode.rules import GREEDY, Past, Sampling
from jaxllm.decode.sample import Feed, Program, State, advance, begin, bucket, check, ints, pad, whole_chunks
from jaxllm.decode.weights import layered
from jaxllm.records import Params
from jaxllm.runtime import Runtime

TOKENS_PER_DISPATCH = 4

_advance = partial(jax.jit, static_argnums=0, donate_argnums=2)(advance)


@partial(jax.jit, static_argnums=0)
def _begin(program: Program, params: Params, feed: Feed, past: Past, seed_B: Any, limit_B: Any) -> State:
    return begin(program, params, None, feed, past, seed_B, limit_B)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _resume(
    program: Program, params: Params, caches: Caches, feed: Feed, past: Past, seed_B: Any, limit_B: Any
) -> State:
    return begin(program, params, forget(caches, feed.start_B), feed, past, seed_B, limit_B)


class Decoder:
    """One row of decoding that remembers its cache, so that a prompt which continues what was said is only fed its end.

    The only state is the last `State`; if decoding is interrupted, what was already in the cache is kept, or, where the
    interrupt lost it, fed again. Weights are used as given: lay them out with `sample.prepare` first.
    """

    def __init__(
        self, spec: Transformer, params: Params, runtime: Runtime = Runtime(), eos: Sequence[int] = ()
    ) -> None:
        self.spec, self.params = layered(spec, params)
        self.runtime, self.eos = spread(runtime, 1), tuple(eos)
        self._state: State | None = None
        self._size = 0

    def tokens(
        self, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[int]:
        """The new ids, one by one, a final eos included. Raises ValueError as `generate` does, before any work."""
        check(self.spec, [prompt], max_new_tokens)
        return self._tokens(list(prompt), max_new_tokens, sampling, seed)

    def _tokens(self, prompt: list[int], new: int, sampling: Sampling, seed: int) -> Iterator[int]:
        program = self._program(len(prompt) + new, sampling)
        reused = self.reusable(prompt)
        limit_B = ints([len(prompt) + new])
        past = Past(pad([prompt], program.size), ints([len(prompt)]), ints([len(prompt)]))
        rest = prompt[reused:]
        feed = Feed(pad([rest], whole_chunks(bucket(len(rest)))), ints([reused]), ints([len(rest)]))
        args = (feed, past, np.array([seed], np.uint32), limit_B)
        if self._state is None or not reused:
            self._state = _begin(program, self.params, *args)
        else:
            self._state = _resume(program, self.params, self._state.caches, *args)
        yield from self._rest(program, len(prompt))

    def _rest(self, program: Program, sent: int) -> Iterator[int]:
        while True:
            state = self._state
            assert state is not None, "set by the caller, before the first token"
            tokens, length, done = jax.device_get((state.past.tokens_BS[0], state.past.length_B[0], state.done_B[0]))
            yield from map(int, tokens[sent:length])
            sent = int(length)
            if done:
                return
            self._state = _advance(program, self.params, state, TOKENS_PER_DISPATCH)

    def reusable(self, prompt: Sequence[int]) -> int:
        """How many tokens of `prompt` need not be fed: those in the cache, and never the last one."""
        state = self._state
        if state is None or any(x.is_deleted() for x in jax.tree.leaves(state)):
            return 0
        held = np.asarray(state.past.tokens_BS[0, : int(state.cached_B[0])])
        n = min(len(held), len(prompt) - 1)
        differs = np.nonzero(held[:n] != np.asarray(prompt[:n]))[0]
        return int(differs[0]) if len(differs) else n

    def _program(self, length: int, sampling: Sampling) -> Program:
        """A cache that holds `length` tokens; one that is too small is dropped, and its tokens are fed again."""
        if length > self._size:
            self._state, self._size = None, bucket(length)
        return Program(self.spec, self.runtime, sampling, self.eos, self._size, ring=False)


def pieces(ids: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """The text of `ids`, in pieces that are final: joined they are the decoded text, control tokens left out.

    It ends before the first of the `stop` strings; text that may still become one is held back.
    Raises ValueError for an empty stop string.
    """
    if any(not s for s in stop):
        raise ValueError(f"stop={list(stop)!r}: an empty string stops everywhere; leave it out")
    stream, held = Stream(tokenizer), ""
    for i in ids:
        stream, text = stream.push(i)
        held += text
        ready, held, stopped = cut(held, stop)
        if ready:
            yield ready
        if stopped:
            return
    ready, held, stopped = cut(held + stream.finish(), stop)
    if text := ready if stopped else ready + held:
        yield text


def cut(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """(what may be shown, what must be held back, whether a stop string was met, in which case the rest is gone)."""
    found = [i for i in (text.find(s) for s in stop) if i >= 0]
    if found:
        return text[: min(found)], "", True
    held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - held], text[len(text) - held :], False


class TextModel(Protocol):
    """What `jaxllm.load` gives: weights, and the tokenizer they were made with. eos: ids that end a text."""

    @property
    def spec(self) -> Transformer:
        """What the function is."""
        ...

    @property
    def params(self) -> Params:
        """Nested dicts of weights."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to ids and back."""
        ...

    @property
    def eos(self) -> tuple[int, ...]:
        """Ids that end a text."""
        ...


def stream(
    model: TextModel,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    eos: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    runtime: Runtime = Runtime(),
) -> Iterator[str]:
    """The text that `generate` gives for this prompt, in pieces as it is drawn; None for `eos` takes the model's.

    Raises ValueError for a model without a tokenizer, and as `generate` does, before anything is run.
    """
    tokenizer = require_tokenizer(model)
    ids = tokenizer.encode(prompt, bos=tokenizer.add_bos) if isinstance(prompt, str) else prompt
    decoder = Decoder(model.spec, model.params, runtime, model.eos if eos is None else eos)
    return pieces(decoder.tokens(ids, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed), tokenizer, stop)


def require_tokenizer(model: TextModel) -> Tokenizer:
    """The model's tokenizer. ValueError when it has none."""
    if model.tokenizer is None:
        raise ValueError("this model has tokenizer=None; put tokenizer.json or tokenizer.model beside its weights")
    return model.tokenizer
