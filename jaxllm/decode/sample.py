"""Generating tokens: one jitted program of prefill, then a loop of `forward`, choose, `commit` until all rows are done.

Rows are aligned at slot 0 and padded at the end, so that slot = position for every real token, whatever the lengths of
the other prompts; padding is segment 0 and is never committed. A row's randomness is fold_in(its seed, its own step):
batch mates, buckets and chunks cannot change what it says.

Unusual: a step commits its rows after it has chosen the next token, and not for rows that this token ends. So the write
depends on everything that reads the cache, which lets XLA update it in place; written before, the CPU backend copies
the whole cache four times per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxllm import cache
from jaxllm.cache import Caches
from jaxllm.config import DynamicNTK, EncoderDecoder, Transformer, VisionLanguage
from jaxllm.decode.images import see
from jaxllm.decode.layout import spread
from jaxllm.decode.memory import part_that_speaks, read, text_half
from jaxllm.decode.rules import GREEDY, Past, Sampling
from jaxllm.decode.weights import layered, prepare
from jaxllm.nn.position import by_length, relative_bias
from jaxllm.records import Inputs, Memory, Output, Params
from jaxllm.runtime import Runtime
from jaxllm.sharding import constrain
from jaxllm.transformer import forward, logits
from jaxllm.vision_language import Pixels

__all__ = ["Feed", "Generation", "Program", "State", "advance", "begin", "fill", "generate", "prepare"]

CHUNK = 1024  # prompt tokens fed at once; a longer one goes through in a loop, since its rows are as large as its cache


@dataclass(frozen=True)
class Program:
    """What is static in a decoding program: one compilation per value and shape.

    size: slots per row, prompt and answer.  ring: whether windowed layers keep only their window (then nothing can be
    taken back).  eos: ids that end a row.
    """

    spec: Transformer
    runtime: Runtime
    sampling: Sampling
    eos: tuple[int, ...]
    size: int
    ring: bool = True


@struct.dataclass
class Feed:
    """Tokens to put through the model. new_BT: int32, the first count_B[b] are real, at slots start_B[b] onwards.

    embeds_BTD: what stands in the tokens' place (text with images in it).  position_ABT: int32, what rotary sees of
    them.  shift_B: int32, without `position_ABT`: position = slot + shift (M-RoPE counts an image's tokens as fewer).
    None: the tokens; slots.  memory: what cross-attention reads, its keys and values made.
    """

    new_BT: Int[Array, "B T"]
    start_B: Int[Array, " B"]
    count_B: Int[Array, " B"]
    embeds_BTD: Float[Array, "B T D"] | None = None
    position_ABT: Int[Array, "A B T"] | None = None
    shift_B: Int[Array, " B"] | None = None
    memory: Memory | None = None

    def part(self, i: Any, width: int) -> Feed:
        """The i-th chunk of `width` tokens."""

        def of(x: Array | None, axis: int) -> Array | None:
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, i * width, width, axis)

        count_B = jnp.clip(self.count_B - i * width, 0, width)
        new_BT = jax.lax.dynamic_slice_in_dim(self.new_BT, i * width, width, 1)
        start_B, embeds_BTD, position_ABT = self.start_B + i * width, of(self.embeds_BTD, 1), of(self.position_ABT, 2)
        return Feed(new_BT, start_B, count_B, embeds_BTD, position_ABT, self.shift_B, self.memory)


@struct.dataclass
class State:
    """A batch in the middle of decoding.

    past: all tokens of each row; the last one is not yet in the caches.  cached_B: slots that are.
    logprob_BS: float32, of each token of `past` that was generated, under the model before any rule; 0 for the prompt.
    rules: the state of the logits rules.  key_B: one random key per row.  limit_B: length at which a row ends.
    shift_B, memory: as in `Feed`.
    """

    caches: Caches
    past: Past
    cached_B: Int[Array, " B"]
    logprob_BS: Float[Array, "B S"]
    rules: Any
    key_B: Array
    limit_B: Int[Array, " B"]
    done_B: Array
    shift_B: Int[Array, " B"] | None = None
    memory: Memory | None = None


@struct.dataclass
class Generation:
    """tokens_BT: int32 [B, max_new_tokens], the first length_B[b] are real (a final eos included), the rest 0.

    logprob_BT: float32, log-probability in nats of each token under the model, before any rule; 0 past the length.
    """

    tokens_BT: Int[Array, "B T"]
    length_B: Int[Array, " B"]
    logprob_BT: Float[Array, "B T"]

    def ids(self) -> list[list[int]]:
        """Each row's new tokens, a final eos included."""
        tokens, lengths = jax.device_get((self.tokens_BT, self.length_B))
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


# ------------------------------------------------------------------------------------------------- the public verbs


def generate(
    spec: Transformer | VisionLanguage | EncoderDecoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seeds: int | Sequence[int] = 0,
    eos: Sequence[int] = (),
    runtime: Runtime = Runtime(),
    **pixels: Unpack[Pixels],
) -> Generation:
    """Continue every prompt (lists of ids, of any lengths) by up to `max_new_tokens`, ending a row at any id of `eos`.

    seeds: one per row, or a number s for s, s + 1, ...  The same seed and prompt give the same row in any batch.
    Lengths are padded to buckets, so that calls of like size share a compilation.
    Of an encoder-decoder `prompts` are what the encoder reads, and the tokens are what the decoder says after its start
    id.  pixels: images of a vision-language model, as `jaxllm.logits` takes them.
    Raises ValueError for an empty prompt, an id outside the vocabulary, more tokens than `spec.context`, or images that
    do not fit their tokens.
    """
    source = prompts
    if isinstance(spec, EncoderDecoder):
        prompts = [[spec.start]] * len(prompts)
    check(spec, prompts, max_new_tokens)
    longest = max(map(len, prompts))
    text, own = layered(*text_half(spec, params))
    runtime = spread(runtime, len(prompts))
    program = Program(text, runtime, sampling, tuple(eos), bucket(longest + max_new_tokens))
    feed, *start = _start(program, prompts, bucket(longest), seeds, max_new_tokens)
    if isinstance(spec, EncoderDecoder):
        feed = replace(feed, memory=read(spec, text, (params, own), runtime, source))
    if isinstance(spec, VisionLanguage):
        feed = replace(feed, **see(spec, params, runtime, feed.new_BT, feed.count_B, pixels)._asdict())
    elif pixels:
        raise ValueError(f"generate: {', '.join(pixels)}: model {spec.name!r} does not see; leave them out")
    return _collect(_generate(program, own, feed, *start), max_new_tokens)


def check(
    spec: Transformer | VisionLanguage | EncoderDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """ValueError unless these prompts and their answers fit the model."""
    if not prompts or max_new_tokens < 1:
        raise ValueError(f"generate: wants prompts and max_new_tokens >= 1, got {len(prompts)} and {max_new_tokens}")
    placed = spec.image_token if isinstance(spec, VisionLanguage) else None  # may lie outside the vocabulary
    stacks = part_that_speaks(spec).stacks
    endless = any(isinstance(scaling, DynamicNTK) for scaling in by_length(stacks))  # made for more than `context`
    endless = endless or relative_bias(stacks) is not None
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"generate: prompt {i} has no tokens; start it with the tokenizer's bos id or some text")
        text = [token for token in prompt if token != placed] if placed in prompt else prompt
        low, high = min(text, default=0), max(text, default=0)
        if low < 0 or high >= spec.vocab:
            raise ValueError(
                f"generate: prompt {i} has ids {low}..{high}, but the vocabulary has 0..{spec.vocab - 1}; "
                "does this tokenizer belong to the model?"
            )
        if len(prompt) + max_new_tokens > spec.context and not endless:
            raise ValueError(
                f"generate: prompt {i} has {len(prompt)} tokens, and with max_new_tokens={max_new_tokens} exceeds the "
                f"model's context of {spec.context}; shorten the prompt or ask for {spec.context - len(prompt)} at most"
            )


def bucket(n: int, least: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96 ... that holds n: at most half as much again."""
    size = least
    while size < n:
        size *= 2
    return size * 3 // 4 if size > least and size * 3 // 4 >= n else size


def whole_chunks(width: int) -> int:
    """A prompt's width rounded up to whole chunks, if it needs more than one."""
    return width if width <= CHUNK else -(-width // CHUNK) * CHUNK


# ---------------------------------------------------------------------------------------------------- the programs


def ints(values: Sequence[int]) -> Any:
    """numpy int32 [n], which jit takes as it takes an Array."""
    return np.array(values, np.int32)


def pad(rows: Sequence[Sequence[int]], width: int) -> Any:
    """Rows of ids as one int32 array, 0 past their ends."""
    out = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out


def _start(
    program: Program, prompts: Sequence[Sequence[int]], width: int, seeds: int | Sequence[int], new: int
) -> tuple[Feed, Past, Any, Any]:
    batch = len(prompts)
    rows = np.arange(seeds, seeds + batch) if isinstance(seeds, int) else np.asarray(seeds)
    if rows.shape != (batch,):
        raise ValueError(f"generate: wants one seed per prompt, got {rows.size} seeds for {batch} prompts")
    length_B = ints([len(p) for p in prompts])
    feed = Feed(pad(prompts, whole_chunks(width)), np.zeros_like(length_B), length_B)
    return feed, Past(pad(prompts, program.size), length_B, length_B), rows.astype(np.uint32), length_B + np.int32(new)


def empty(program: Program, batch: int) -> Caches:
    """Caches for `program.size` slots, laid out as the runtime says."""
    runtime = program.runtime
    caches = cache.init(program.spec, batch, program.size, runtime.compute_dtype, program.ring)
    place = partial(constrain, axes=(None, "batch", "kv_heads", None, None), layout=runtime.layout)
    return jax.tree.map(lambda x: place(x) if x.ndim == 5 else x, caches)


def run(program: Program, params: Params, caches: Caches, feed: Feed, fresh: bool = False) -> tuple[Array, Output]:
    """One forward of new tokens: hidden state of each row's last real one [B, D], and the output with its rows.

    fresh: nothing is cached and rows start at slot 0, which keeps the slots static: kernels can skip blocks.
    """
    i_1T = jnp.arange(feed.new_BT.shape[1])[None]
    real_BT = i_1T < feed.count_B[:, None]
    slot_BT = feed.start_B[:, None] + i_1T
    place_BT = slot_BT if feed.shift_B is None else slot_BT + feed.shift_B[:, None]
    position = jnp.where(real_BT, place_BT, 0)  # padding has no place: past a learned table it would read NaN
    position = position if feed.position_ABT is None else feed.position_ABT
    tokens_BT = feed.new_BT if feed.embeds_BTD is None else None
    slot_BT, segment_BT = None if fresh else slot_BT, real_BT.astype(jnp.int32)
    given = Inputs(tokens_BT, position, feed.embeds_BTD, slot_BT, segment_BT, memory=feed.memory)
    runtime = program.runtime
    held = cache.init(program.spec, feed.new_BT.shape[0], 0, runtime.compute_dtype) if fresh else caches
    out = forward(params, program.spec, given, runtime, held)
    last_B = jnp.maximum(feed.count_B - 1, 0)
    return jnp.take_along_axis(out.hidden_BTD, last_B[:, None, None], 1)[:, 0], out


def fill(program: Program, params: Params, caches: Caches | None, feed: Feed) -> tuple[Array, Caches]:
    """Put a prompt of any length into the caches (None: empty ones), CHUNK tokens at a time.

    Returns the hidden state of each row's last token [B, D], and the caches.
    """
    B, T = feed.new_BT.shape
    width = T if by_length(program.spec.stacks) else min(T, CHUNK)  # such rotations must see the whole length

    def chunk(i: Any, carry: tuple[Array, Caches], fresh: bool = False) -> tuple[Array, Caches]:
        hidden_BD, caches = carry
        part = feed.part(i, width)
        last_BD, out = run(program, params, caches, part, fresh)
        caches = cache.commit(caches, out.rows, part.start_B, part.count_B)
        return jnp.where((part.count_B > 0)[:, None], last_BD, hidden_BD), caches

    held = empty(program, B) if caches is None else caches
    carry = jnp.zeros((B, program.spec.dim), program.runtime.compute_dtype), held
    carry = chunk(0, carry, fresh=caches is None)
    return carry if width == T else jax.lax.fori_loop(1, T // width, chunk, carry)


def begin(
    program: Program, params: Params, caches: Caches | None, feed: Feed, past: Past, seed_B: Array, limit_B: Array
) -> State:
    """Feed what the caches (None: empty) lack of the prompts, and choose the first new token of each row."""
    batch = feed.new_BT.shape[0]
    hidden_BD, caches = fill(program, params, caches, feed)
    cached_B, zeros_BS = feed.start_B + feed.count_B, jnp.zeros(past.tokens_BS.shape, jnp.float32)
    keys, done_B = jax.vmap(jax.random.key)(seed_B), jnp.zeros(batch, bool)
    rules = program.sampling.rule.init(past)
    state = State(caches, past, cached_B, zeros_BS, rules, keys, limit_B, done_B, feed.shift_B, feed.memory)
    return choose(program, params, state, hidden_BD)


def choose(program: Program, params: Params, state: State, hidden_BD: Float[Array, "B D"]) -> State:
    """Draw each row's next token and append it, unless the row is done; a row ends at an eos id or at its limit."""
    past, sampling = state.past, program.sampling
    logits_BV = logits(params, program.spec, hidden_BD[:, None], program.runtime)[:, 0]
    allowed_BV, rules = sampling.rule.apply(logits_BV, state.rules, past)
    if sampling.greedy:
        token_B = jnp.argmax(allowed_BV, -1).astype(jnp.int32)
    else:
        keys = jax.vmap(jax.random.fold_in)(state.key_B, past.length_B - past.prompt_B)
        token_B = jax.vmap(jax.random.categorical)(keys, allowed_BV).astype(jnp.int32)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], 1)[:, 0]
    logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, -1)
    here_BS = (jnp.arange(program.size)[None] == past.length_B[:, None]) & ~state.done_B[:, None]
    past = replace(
        past,
        tokens_BS=jnp.where(here_BS, token_B[:, None], past.tokens_BS),
        length_B=past.length_B + ~state.done_B,
    )
    ended_B = jnp.isin(token_B, jnp.asarray(program.eos, jnp.int32)) | (past.length_B >= state.limit_B)
    logprob_BS = jnp.where(here_BS, logprob_B[:, None], state.logprob_BS)
    return replace(state, past=past, rules=rules, logprob_BS=logprob_BS, done_B=state.done_B | ended_B)


def advance(program: Program, params: Params, state: State, steps: Int[Array, ""] | int) -> State:
    """Up to `steps` more tokens for every row that is not done; stops as soon as all are."""

    def going(carry: tuple[Array, State]) -> Array:
        return (carry[0] < steps) & ~jnp.all(carry[1].done_B)

    def step(carry: tuple[Array, State]) -> tuple[Array, State]:
        i, state = carry
        at_B = state.past.length_B - 1
        feed = Feed(_last(state.past)[:, None], at_B, jnp.ones_like(at_B), shift_B=state.shift_B, memory=state.memory)
        hidden_BD, out = run(program, params, state.caches, feed)
        new = choose(program, params, state, hidden_BD)
        seen_B = _last(new.past) >= 0  # always so; it makes the write wait for the token even if nothing else does
        count_B = (~new.done_B & seen_B).astype(jnp.int32)
        caches = cache.commit(state.caches, out.rows, at_B, count_B)
        return i + 1, replace(new, caches=caches, cached_B=state.cached_B + count_B)

    return jax.lax.while_loop(going, step, (jnp.int32(0), state))[1]


def _last(past: Past) -> Int[Array, " B"]:
    """The newest token of each row."""
    return jnp.take_along_axis(past.tokens_BS, past.length_B[:, None] - 1, 1)[:, 0]


@partial(jax.jit, static_argnums=0)
def _generate(program: Program, params: Params, feed: Feed, past: Past, seed_B: Array, limit_B: Array) -> State:
    state = begin(program, params, None, feed, past, seed_B, limit_B)
    return replace(advance(program, params, state, program.size), caches=(), memory=None)


@partial(jax.jit, static_argnums=1)
def _collect(state: State, width: int) -> Generation:
    past = state.past
    length_B, i_1T = past.length_B - past.prompt_B, jnp.arange(width)[None]
    at_BT = jnp.minimum(past.prompt_B[:, None] + i_1T, past.tokens_BS.shape[1] - 1)
    real_BT = i_1T < length_B[:, None]
    tokens_BT = jnp.where(real_BT, jnp.take_along_axis(past.tokens_BS, at_BT, 1), 0)
    return Generation(tokens_BT, length_B, jnp.where(real_BT, jnp.take_along_axis(state.logprob_BS, at_BT, 1), 0.0))
