"""Layers: each `<x>_params(cfg, ...)` declares, each `<x>(p, cfg, x, ...)` computes. No state, no classes."""
