"""Decoding: logits rules, sampling, streaming, chat."""
