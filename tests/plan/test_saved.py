"""Bytes and FLOPs by name, against what jax itself keeps for a backward pass."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from architectures import SPECS, params_of, tokens

from jaxllm.models.presets import PRESETS
from jaxllm.plan.info import info
from jaxllm.plan.saved import ladder, products, recomputed_flops, saved_bytes
from jaxllm.records import inputs
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout
from jaxllm.transformer import forward

B, T = 2, 32


def kept(name, runtime):
    """Bytes of residuals of a forward, parameters left out."""
    spec, params = SPECS[name], params_of(name)

    def loss(params):
        return jnp.sum(forward(params, spec, inputs(tokens(jax.random.key(0), B, T)), runtime).hidden_BTD)

    pull = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))


@pytest.mark.parametrize("name", ["toy_llama31_8b", "toy_gemma2_2b", "toy_deepseek_v3", "toy_olmo2_7b"])
def test_bytes_of_a_name_are_what_jax_keeps(name):
    """Beyond what "full" keeps. Lists of one, and a long one; float32."""
    spec = SPECS[name]
    blocks = [block for stack in spec.stacks for block in stack.pattern * stack.repeats]
    least = kept(name, Runtime(remat="full"))

    def formula(remat):
        return B * T * sum(saved_bytes(block, spec, T, Runtime(remat=remat))[0] for block in blocks)

    for remat in (("query", "latent", "router"), ("attention", "key", "gate"), "dots"):
        more = kept(name, Runtime(remat=remat)) - least
        assert more == pytest.approx(formula(remat) - formula("full"), rel=0.01, abs=600), remat


def test_offloaded_names_are_not_in_device_memory():
    spec = PRESETS["llama31_8b"]()
    (block,) = spec.stacks[0].pattern
    plain, off = (saved_bytes(block, spec, 8192, Runtime(remat=("up",), offload=o)) for o in ((), ("stream", "up")))
    assert (plain, off) == ((4 * (4096 + 14336), 0), (0, 4 * (4096 + 14336)))
    cut = Runtime(remat=("up",), layout=Layout(tensor=2, split_stream=True))
    assert saved_bytes(block, spec, 8192, cut) == (plain[0] // 2, 0)


def test_what_is_not_saved_is_made_again():
    """Nothing saved: the forward FLOPs of the layers but for their last product."""
    spec = PRESETS["llama31_8b"]()
    (block,) = spec.stacks[0].pattern
    forward_flops = info(spec, 8192).forward_flops
    head, down = 2 * 4096 * 128_256, 2 * 14336 * 4096
    again = 32 * recomputed_flops(block, spec, 8192, Runtime(remat="full"))
    assert again == pytest.approx(sum(forward_flops.values()) - head - 32 * down)
    less = recomputed_flops(block, spec, 8192, Runtime(remat=("up",), offload=("gate",)))
    assert less == again / 32 - 4 * 4096 * 14336
    assert recomputed_flops(block, spec, 8192, Runtime(remat="none")) == 0


def test_a_ladder_saves_more_and_makes_less_again():
    for preset in ("llama31_8b", "deepseek_v3", "gemma2_2b", "gpt2_small"):
        spec = PRESETS[preset]()
        steps = ladder(spec)
        assert steps[0] == "full" and steps[-1] == "none" and len(set(steps)) == len(steps)
        blocks = [block for stack in spec.stacks for block in stack.pattern]
        named = {name for block in blocks for name in products(block, spec, 128)} - {"stream"}
        assert set(steps[-2]) == named
        for before, after in itertools.pairwise(steps[:-1]):
            old, new = (Runtime("bfloat16", remat=remat) for remat in (before, after))
            assert sum(saved_bytes(b, spec, 128, new)[0] - saved_bytes(b, spec, 128, old)[0] for b in blocks) > 0
            assert sum(recomputed_flops(b, spec, 128, old) - recomputed_flops(b, spec, 128, new) for b in blocks) > 0
