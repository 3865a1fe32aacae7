"""What encoder-decoders share: the name tables of two halves around one embedding."""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.architectures import model_params
from jaxllm.config import EncoderDecoder
from jaxllm.models.common import Config, Row, rows_of, within
from jaxllm.rules import Alias, Rule, Tensor, applicable


def start_from(config: Config, default: int) -> int:
    """`decoder_start_token_id`."""
    start = config.get("decoder_start_token_id")
    start = default if start is None else start
    if not isinstance(start, int) or start < 0:
        raise ValueError(f"config.json: decoder_start_token_id must be an id, found {start!r}; correct the file")
    return start


Half = tuple[Sequence[Row], str, Sequence[Row]]  # rows once, prefix of the layers' names, rows of a layer


def names_with(
    spec: EncoderDecoder, prefix: str, encoder: Half, decoder: Half, sizes: tuple[tuple[str, int], ...] = ()
) -> list[Rule]:
    """The table: the shared embedding, which old files hold three or four times, and both halves."""
    rules: list[Rule] = [Tensor(f"{prefix}shared.weight", ("tokens",))]
    rules += within(rows_of(spec.encoder, *encoder), "encoder/")
    rules += within(rows_of(spec.decoder, *decoder, sizes), "decoder/")
    copies = [f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight"]
    rules += [Alias(name, "tokens") for name in (*copies, *(("lm_head.weight",) if spec.tied else ()))]
    return applicable(rules, model_params(spec))
