"""A step that is not finite, replayed: the report names the place where it began."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from tiny import experiment

from jaxllm.config import GLU, GQA, MLP, Block, LayerNorm, RMSNorm, Rope, Stack, Transformer
from jaxllm.mesh import make_mesh
from jaxllm.params import init
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout
from jaxllm.train import loop
from jaxllm.train.dataset import prepare, train_batch
from jaxllm.train.loop import train
from jaxllm.train.replay import explain, place_names
from jaxllm.train.step import batch_sharding
from jaxllm.transformer import transformer_params

QUIET = Console(quiet=True)
PAIR = (
    Block(GQA(2, 1, 8, position=Rope()), GLU(32), RMSNorm(), place="sandwich"),
    Block(GQA(2, 2, 8, position=Rope()), MLP(32), LayerNorm()),
)
MODEL = Transformer(300, 16, (Stack(PAIR, 2), Stack(PAIR[:1], 1)), RMSNorm(), context=32, name="five layers")


def spoiled(params, path, index, value):
    """The parameters with `value` at an index of the one at `path`."""
    *parents, name = path.split("/")
    node = params = jax.tree.map(lambda x: x, params)  # new dicts
    for parent in parents:
        node = node[parent]
    node[name] = node[name].at[index].set(value)
    return params


def explained(folder, *planted, **changes):
    exp = experiment(folder, model=MODEL, **changes)
    mesh = make_mesh(exp.runtime.layout or Layout(data=1), jax.devices()[: 8 if exp.runtime.layout else 1])
    params = init(transformer_params(MODEL), jax.random.key(0))
    for path, index, value in planted:
        params = spoiled(params, path, index, value)
    with jax.set_mesh(mesh):
        batch = train_batch(prepare(exp).train, 3, batch_sharding(exp.runtime, mesh))
        return explain(exp, params, batch, 3)


@pytest.mark.parametrize(
    ("path", "index", "place"),
    [
        ("embed/tokens", (slice(None), 3), "the embedding; weights that are not finite: embed/tokens"),
        ("stacks/0/1/attn/v/kernel", (1, 2, 0, 0), r"layer 3 of 5, counted from 0 \(stacks/0/1\[1\]\), its attention"),
        ("stacks/1/0/ffn/up/kernel", (0, 2, 5), r"layer 4 of 5, counted from 0 \(stacks/1/0\[0\]\), its feed-forward"),
        ("norm/scale", 4, "the final norm"),
        ("head/kernel", (7, 7), "the head"),
    ],
)
def test_bad_weights_are_found_where_they_are(tmp_path, path, index, place):
    text = explained(tmp_path, (path, index, jnp.nan))
    assert re.search(f"first activations that are not finite are those of {place}", text)
    number = f"[{index[0]}]" if path.startswith("stacks") else ""
    assert text.endswith(f"weights that are not finite: {path}{number}")


def test_sharded_and_accumulated(tmp_path):
    layout = Layout(tensor=1, zero=3, replicate_below=0)
    changes = {"runtime": Runtime(layout=layout, remat="full"), "batch_size": 16, "accumulate": 2}
    text = explained(tmp_path, ("stacks/0/0/ffn/down/kernel", (1, 3, 3), jnp.inf), **changes)
    assert "those of layer 2 of 5, counted from 0 (stacks/0/0[1]), its feed-forward" in text


def test_bad_gradients_are_found_where_they_arise(tmp_path):
    """One unit of a feed-forward is 1e24 and is multiplied by 1e-24: only the gradient of that factor is too large."""
    up, down = (("stacks/0/1/ffn/up/kernel", (1, 2, 5), 1e24), ("stacks/0/1/ffn/down/kernel", (1, 5), 1e-24))
    text = explained(tmp_path, up, down)
    assert "all its activations are finite; its gradients, or their squares, are not, from layer 3 of 5" in text
    assert text.endswith("(stacks/0/1[1]) backwards: stacks/0/1/ffn/down/kernel[1]")


def test_a_fault_that_does_not_repeat_is_not_blamed_on_a_layer(tmp_path):
    assert "the fault does not repeat" in explained(tmp_path)


def test_places_follow_the_forward_pass():
    places = [name.partition("(")[2].rstrip(")") for name in place_names(MODEL)]
    assert places[1:-2] == ["stacks/0/0[0]", "stacks/0/1[0]", "stacks/0/0[1]", "stacks/0/1[1]", "stacks/1/0[0]"]


def test_a_run_that_stops_names_the_layer(tmp_path, monkeypatch):
    original = loop.init_state

    def planted(tree, optimizer, key, **how):
        state = original(tree, optimizer, key, **how)
        return replace(state, params=spoiled(state.params, "stacks/0/0/ffn/down/kernel", (1, 0, 0), jnp.nan))

    monkeypatch.setattr(loop, "init_state", planted)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .*layer 1 of 2.*its feed-forward.*2 were skipped"):
        train(experiment(tmp_path, max_bad_steps=2), QUIET)
