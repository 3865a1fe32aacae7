"""From text to batches: tokenizers, corpora, shards, packing, mixtures."""
