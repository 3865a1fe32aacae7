"""Models of several stacks: encoder-decoders."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxllm.config.models import Embedding, LMHead, Transformer


@dataclass(frozen=True)
class EncoderDecoder:
    """A decoder whose layers attend to an encoder's output (Vaswani et al. 2017).

    Both read one embedding [vocab, dim], which belongs to neither; `encoder.head` is None, `decoder.head` may be tied
    to that embedding. `start` is the id that every output begins with.
    """

    encoder: Transformer
    decoder: Transformer
    start: int
    name: str = field(default="encoder_decoder", compare=False)

    def __post_init__(self) -> None:
        e, d = self.encoder, self.decoder
        if (e.vocab, e.dim, e.embed.dim) != (d.vocab, d.dim, d.embed.dim):
            raise ValueError(
                f"EncoderDecoder: both halves read one embedding, found [{e.vocab}, {e.dim}] and [{d.vocab}, {d.dim}]"
            )
        if e.causal or not d.causal or e.head is not None:
            raise ValueError(
                f"EncoderDecoder: wants an encoder without head that is not causal and a causal decoder, found "
                f"causal={e.causal}, {d.causal} and head={e.head}"
            )
        blocks = [block for stack in d.stacks for block in stack.pattern]
        if any(block.cross is None or block.cross.dim != e.dim for block in blocks):
            raise ValueError(f"EncoderDecoder: every block of the decoder needs cross=Cross(..., dim={e.dim})")

    @property
    def vocab(self) -> int:
        """Rows of the embedding."""
        return self.decoder.vocab

    @property
    def dim(self) -> int:
        """Width of both halves."""
        return self.decoder.dim

    @property
    def context(self) -> int:
        """The longest output it was made for."""
        return self.decoder.context

    @property
    def layers(self) -> int:
        """Number of blocks in both halves."""
        return self.encoder.layers + self.decoder.layers

    @property
    def embed(self) -> Embedding:
        """What the encoder does with token embeddings."""
        return self.encoder.embed

    @property
    def head(self) -> LMHead | None:
        """The decoder's."""
        return self.decoder.head

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.decoder.tied
