"""Attention: one op, and those who compute it."""
