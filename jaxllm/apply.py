"""What a model makes of arrays of ids: logits, hidden states, scores of classifiers. Checked, then one jitted program.

    logits(spec, params, input_ids, attention_mask)                        # [B, T, V]
    logits(spec, params, source, mask, decoder_input_ids=target)           # of an encoder-decoder, for the target
    hidden_states(spec, params, input_ids, attention_mask)                 # L + 1 arrays [B, T, D]
    classify(spec, params, "nsp", input_ids, token_type_ids=types)         # [B, labels]

Ids are lists, numpy or jax, [B, T]; an attention mask has 1 for real tokens and 0 for padding on either side. What
stands at padding is meaningless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict, Unpack, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxllm import encoder_decoder, transformer, vision_language
from jaxllm.architectures import Spec
from jaxllm.config import EncoderDecoder, Learned, Longformer, Transformer, TwoTower, VisionLanguage
from jaxllm.nn.head import lm_head
from jaxllm.nn.patch import Patched, cut
from jaxllm.records import Inputs, Output, inputs
from jaxllm.runtime import Runtime
from jaxllm.two_tower import Similarity, compare
from jaxllm.vision_language import Media, Pixels

Rows = ArrayLike | Sequence[Any]


class Words(TypedDict, total=False):
    """Inputs that only some models read, all [B, T] integers.

    token_type_ids: which of two sentences (BERT).  global_attention_mask: 1 for tokens that see, and are seen from,
    everywhere (Longformer).  decoder_input_ids, decoder_attention_mask: an encoder-decoder's output so far, from its
    start id on.
    """

    token_type_ids: Rows | None
    global_attention_mask: Rows | None
    decoder_input_ids: Rows | None
    decoder_attention_mask: Rows | None


class More(Words, Pixels, total=False):
    """What a call of any model may get beside ids and attention mask."""


@struct.dataclass
class Given:
    """Checked inputs. global_BG: slots of global tokens, T where a row has fewer than others; None: not given."""

    ids_BT: Int[Array, "B T"]
    mask_BT: Int[Array, "B T"] | None = None
    type_BT: Int[Array, "B T"] | None = None
    global_BG: Int[Array, "B G"] | None = None
    target_BT: Int[Array, "B U"] | None = None
    target_mask_BT: Int[Array, "B U"] | None = None


def logits(
    spec: Spec,
    params: Any,
    input_ids: Rows,
    attention_mask: Rows | None = None,
    *,
    runtime: Runtime = Runtime(),
    **more: Unpack[More],
) -> Float[Array, "B T V"]:
    """float32 [B, T, V] of every position, in one jitted forward; compiled once per (spec, runtime, B, T).

    Of an encoder-decoder: for every position of `decoder_input_ids`. Of a vision-language model: with what the
    reference's processor gives, pixel_values (float [N, channels, height, width], or flat patches [P, X] with
    image_grid_thw int [N, 3]), pixel_values_videos, video_grid_thw ...; the n-th image token of `input_ids` is the n-th
    vector of the images.
    Raises ValueError for ragged rows, an id outside the vocabulary, more tokens than learned positions, images that do
    not fit their tokens, inputs that the model does not read, or a spec without a language-model head.
    """
    match spec:
        case VisionLanguage():
            ids, mask = _batch(spec, input_ids, attention_mask)
            if ids.shape[1] > spec.context:
                raise ValueError(f"input_ids has {ids.shape[1]} tokens, the model a context of {spec.context}; cut it")
            return _visual_logits(spec, runtime, params, *vision_language.prepare(spec, ids, mask, _pixels(spec, more)))
        case TwoTower():
            raise ValueError(f"logits: a {type(spec).__name__} has none; see jaxllm.similarity")
        case EncoderDecoder() | Transformer():
            lm_head(spec.decoder if isinstance(spec, EncoderDecoder) else spec)
            return _logits(spec, runtime, params, _given(spec, input_ids, attention_mask, more))
        case other:
            assert_never(other)


def hidden_states(
    spec: Transformer | EncoderDecoder,
    params: Any,
    input_ids: Rows,
    attention_mask: Rows | None = None,
    *,
    runtime: Runtime = Runtime(),
    **more: Unpack[More],
) -> list[Float[Array, "B T D"]]:
    """What enters the first layer, what leaves each layer but the last, and what the final norm makes of that one.

    Of an encoder-decoder: the decoder's, or the encoder's when `decoder_input_ids` are not given. Raises as `logits`.
    """
    if isinstance(spec, EncoderDecoder) and more.get("decoder_input_ids") is None:
        encoder, half = spec.encoder, encoder_decoder.half(params, "encoder")
        return hidden_states(encoder, half, input_ids, attention_mask, runtime=runtime)
    tapped = replace(runtime, taps=("residual",))
    residuals, last = _hidden(spec, tapped, params, _given(spec, input_ids, attention_mask, more))
    return [*residuals, last]


def classify(
    spec: Transformer,
    params: Any,
    name: str,
    input_ids: Rows,
    attention_mask: Rows | None = None,
    *,
    runtime: Runtime = Runtime(),
    **more: Unpack[More],
) -> Float[Array, "B *T labels"]:
    """float32 scores [B, labels] of the classifier `name` of `spec.classifiers`; [B, T, labels] if it reads all tokens.

    A Longformer that reads the first token makes it global unless told otherwise. Raises as `logits`, and ValueError
    for a name that the spec does not have.
    """
    given = _given(spec, input_ids, attention_mask, more)
    cfg = dict(spec.classifiers).get(name)
    if _has_globals(spec) and given.global_BG is None and cfg is not None and name != "pooler":
        if cfg.pool != "first":
            raise ValueError(
                f"classify: {name!r} of a Longformer needs global_attention_mask: 1 for the question's tokens"
            )
        given = replace(given, global_BG=jnp.zeros((len(given.ids_BT), 1), jnp.int32))
    return _classify(spec, runtime, name, params, given)


def similarity(
    spec: TwoTower,
    params: Any,
    input_ids: Rows,
    attention_mask: Rows | None = None,
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


# ------------------------------------------------------------------------------------------------------- programs


@partial(jax.jit, static_argnums=(0, 1))
def _logits(spec: Any, runtime: Runtime, params: Any, given: Given) -> Float[Array, "B T V"]:
    out = _forward(spec, runtime, params, given)
    if isinstance(spec, EncoderDecoder):
        return encoder_decoder.logits(params, spec, out.hidden_BTD, runtime)
    return transformer.logits(params, spec, out.hidden_BTD, runtime)


@partial(jax.jit, static_argnums=(0, 1))
def _hidden(spec: Any, runtime: Runtime, params: Any, given: Given) -> tuple[Array, Array]:
    out = _forward(spec, runtime, params, given)
    return out.aux.taps["residual"], out.hidden_BTD


@partial(jax.jit, static_argnums=(0, 1, 2))
def _classify(spec: Transformer, runtime: Runtime, name: str, params: Any, given: Given) -> Float[Array, "B *T labels"]:
    out = _forward(spec, runtime, params, given)
    return transformer.classify(params, spec, name, out.hidden_BTD, given.mask_BT)


@partial(jax.jit, static_argnums=(0, 1))
def _visual_logits(
    spec: VisionLanguage, runtime: Runtime, params: Any, given: Inputs, media: Media
) -> Float[Array, "B T V"]:
    out = vision_language.forward(params, spec, given, media, runtime)
    return transformer.logits(params["text"], spec.text, out.hidden_BTD, runtime)


@partial(jax.jit, static_argnums=(0, 1))
def _similarity(spec: TwoTower, runtime: Runtime, params: Any, given: Inputs, images: Patched) -> Similarity:
    return compare(params, spec, given, images, runtime)


def _forward(spec: Any, runtime: Runtime, params: Any, given: Given) -> Output:
    if isinstance(spec, EncoderDecoder):
        source = inputs_of(spec.encoder, Given(given.ids_BT, given.mask_BT))
        assert given.target_BT is not None, "checked before"
        target = inputs_of(spec.decoder, Given(given.target_BT, given.target_mask_BT))
        return encoder_decoder.forward(params, spec, source, target, runtime)
    return transformer.forward(params, spec, inputs_of(spec, given), runtime)


def inputs_of(spec: Transformer, given: Given) -> Inputs:
    """Inputs of a batch: its positions by the spec's own rule."""
    base = inputs(given.ids_BT, given.mask_BT)
    position = spec.embed.position
    if isinstance(position, Learned) and position.padding is not None:
        counted = (given.ids_BT != position.padding).astype(jnp.int32)
        base = replace(base, position_BT=jnp.cumsum(counted, 1) * counted - 1)
    return replace(base, type_BT=given.type_BT, global_BG=given.global_BG)


# ---------------------------------------------------------------------------------------------------------- checks


def _given(spec: Transformer | EncoderDecoder, input_ids: Rows, attention_mask: Rows | None, more: Any) -> Given:
    source = spec.encoder if isinstance(spec, EncoderDecoder) else spec
    unread = [f"{name}: {why}" for name, why in _unread(spec, source).items() if more.get(name) is not None]
    if unread:
        raise ValueError(f"{'; '.join(unread)}: spec {spec.name!r} does not read this; leave it out")
    ids, mask = _batch(source, input_ids, attention_mask)
    _fits(source, "input_ids", ids)
    types = _like("token_type_ids", more.get("token_type_ids"), ids)
    everywhere = _like("global_attention_mask", more.get("global_attention_mask"), ids)
    given = Given(ids, mask, types, _slots(everywhere, mask))
    if not isinstance(spec, EncoderDecoder):
        return given
    if more.get("decoder_input_ids") is None:
        raise ValueError(f"spec {spec.name!r} is an encoder-decoder: give decoder_input_ids, from id {spec.start} on")
    target, target_mask = _batch(
        spec.decoder, more["decoder_input_ids"], more.get("decoder_attention_mask"), "decoder_"
    )
    _fits(spec.decoder, "decoder_input_ids", target)
    return replace(given, target_BT=target, target_mask_BT=target_mask)


def _unread(spec: Transformer | EncoderDecoder, source: Transformer) -> dict[str, str]:
    """Inputs that mean nothing to this model, and why."""
    names = dict.fromkeys(Pixels.__annotations__, "it does not see")
    if source.embed.types is None:
        names["token_type_ids"] = "it has no token types"
    if not _has_globals(source):
        names["global_attention_mask"] = "none of its layers has global tokens"
    if not isinstance(spec, EncoderDecoder):
        names |= dict.fromkeys(("decoder_input_ids", "decoder_attention_mask"), "it is no encoder-decoder")
    return names


def _pixels(spec: VisionLanguage, more: Any) -> Pixels:
    unread = sorted(name for name in Words.__annotations__ if more.get(name) is not None)
    if unread:
        raise ValueError(f"{', '.join(unread)}: spec {spec.name!r} does not read this; leave it out")
    return {name: x for name, x in more.items() if name not in Words.__annotations__}  # type: ignore[return-value]


def _has_globals(spec: Transformer) -> bool:
    return any(isinstance(block.attn, Longformer) for stack in spec.stacks for block in stack.pattern)


def _slots(mask: Any, real: Any) -> Int[Array, "B G"] | None:
    """Slots of the ones in [B, T] that are real, as many as the fullest row has; T in the places left over."""
    if mask is None:
        return None
    ones = (np.asarray(mask) > 0) & (True if real is None else np.asarray(real) > 0)
    count, length = int(ones.sum(1).max(initial=0)), ones.shape[1]
    slots = np.sort(np.where(ones, np.arange(length)[None], length), 1)[:, :count]
    return jnp.asarray(slots, jnp.int32) if count else None


def _batch(spec: Spec, input_ids: Any, attention_mask: Any, side: str = "") -> tuple[Any, Any]:
    """Ids and mask as int32 [B, T], checked against each other and the vocabulary. side: how their names begin."""
    ids = _integers(f"{side}input_ids", input_ids)
    mask = _like(f"{side}attention_mask", attention_mask, ids)
    placed = spec.image_token if isinstance(spec, VisionLanguage) else None  # may lie outside the vocabulary
    real = ids[ids != placed] if isinstance(ids, np.ndarray) and placed is not None else ids
    if isinstance(real, np.ndarray) and real.size and (real.min() < 0 or real.max() >= spec.vocab):
        low, high = real.min(), real.max()
        raise ValueError(f"{side}input_ids must be in 0..{spec.vocab - 1}, found {low}..{high}; wrong tokenizer?")
    return ids, mask


def _fits(spec: Transformer, name: str, ids: Any) -> None:
    position = spec.embed.position
    if position is not None and ids.shape[1] > position.length:
        raise ValueError(f"{name} has {ids.shape[1]} tokens, the model {position.length} positions; cut it")


def _like(name: str, given: Rows | None, ids: Any) -> Any:
    """Integers of the shape of `ids`, or None."""
    if given is None:
        return None
    x = _integers(name, given)
    if x.shape != ids.shape:
        raise ValueError(f"{name} {x.shape} must have the shape of the ids {ids.shape}")
    return x


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
