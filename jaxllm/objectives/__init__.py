"""Objectives: `loss(params, spec, batch, runtime, key) -> (loss, aux)`.

The loss is a weighted mean; `aux["weight"]` is the sum of the weights, so that micro-batches add up to the big batch.
Other entries of aux are sums too: they are added over micro-batches and reported by the caller.
"""
