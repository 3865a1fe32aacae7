"""Checkpoints of others: one invertible name table per family, read and written tensor by tensor."""
