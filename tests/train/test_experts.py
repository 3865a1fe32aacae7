"""Training a mixture: its losses and loads in the records, its corrections in the weights."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny import experiment

from jaxllm.config import GLU, GQA, Block, MoE, RMSNorm, Rope, Router, Transformer, decoder
from jaxllm.experiment import Balance
from jaxllm.models.common import with_blocks
from jaxllm.objectives.lm import inputs_of, lm_loss
from jaxllm.params import init
from jaxllm.records import Batch
from jaxllm.runtime import Runtime
from jaxllm.train.loop import train
from jaxllm.train.metrics import read_metrics, utilisation
from jaxllm.transformer import forward, transformer_params

MIXTURE = MoE(GLU(12), 4, Router(2, "sigmoid", correction=True))


def sparse(exp):
    mixed = with_blocks(exp.model, lambda i, block: replace(block, ffn=MIXTURE) if i == 1 else block)
    return replace(exp, model=mixed)


def test_a_run_reports_loads_and_moves_corrections(tmp_path):
    exp = replace(sparse(experiment(tmp_path)), steps=3, balance=Balance(load=0.5, correction=0.01))
    state = train(exp, Console(quiet=True))
    correction = np.asarray(state.params["stacks"]["1"]["0"]["ffn"]["router"]["correction"])
    assert set(np.round(np.abs(correction) * 100).ravel()) <= {0, 1, 2, 3}
    assert np.abs(correction).max() >= 0.01
    for r in (r for r in read_metrics(tmp_path / "run") if "train/loss" in r):
        assert r["train/experts/load_max"] >= 1 >= r["train/experts/load_min"] >= 0
        assert r["train/router_loss"] >= 0.5 * 1.5, "an even load gives the weight times top_k"
        assert r["train/loss"] == pytest.approx((r["train/loss/even"] + r["train/loss/odd"]) / 2, abs=0.3), (
            "the cross-entropy alone"
        )


def test_router_losses_are_weighted_means_over_layers(getkey):
    block = Block(GQA(2, 1, 8, position=Rope()), MIXTURE, RMSNorm())
    spec = Transformer(300, 16, decoder(block, layers=2), RMSNorm(), 32)
    params, ids = init(transformer_params(spec), getkey()), jax.random.randint(getkey(), (2, 9), 0, 300)
    position, ones = np.arange(8) * np.ones((2, 1), np.int32), np.ones((2, 8), np.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, position, ones * 0)
    plain, without = lm_loss(params, spec, batch, Runtime())
    loss, aux = lm_loss(params, spec, batch, Runtime(), balance=Balance(load=0.3, z=0.2))
    from_forward = forward(params, spec, inputs_of(batch), Runtime()).aux.experts
    extra = 0.3 * from_forward["balance"].mean() + 0.2 * from_forward["z"].mean()
    np.testing.assert_allclose(loss - plain, extra, rtol=1e-4)
    np.testing.assert_allclose(aux["router_loss"], 16 * extra, rtol=1e-4)
    assert aux["expert_load"].shape == (2, 4)
    assert "expert_load" not in without


def test_utilisation_is_relative_to_an_equal_share():
    load = np.array([[1.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]]) * 7
    got = utilisation({"expert_load": load, "router_loss": 21.0, "weight": 7.0})
    assert got == {"train/router_loss": 3.0, "train/experts/load_max": 2.0, "train/experts/load_min": 0.0}
