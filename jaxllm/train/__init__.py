"""Training: optimiser, state, step, checkpoints, metrics and the loop."""
