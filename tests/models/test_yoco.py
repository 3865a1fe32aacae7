"""YOCO: against its definition written out, and what its cache takes beside a plain decoder's."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import cache
from jaxllm.architectures import model_params
from jaxllm.config import MLA, RMSNorm, Stack, decoder
from jaxllm.decode.weights import prepare
from jaxllm.models.families import family_of_spec
from jaxllm.models.yoco import yoco, yoco_3b
from jaxllm.params import paths
from jaxllm.plan.info import info
from jaxllm.records import inputs
from jaxllm.runtime import Runtime
from jaxllm.transformer import forward
from tests.models import published
from tests.models.support import noisy

SPEC = yoco("tiny", (6, 48, 6, 2, 61, 40), 5, context=64)
BLOCK = {"attn_norm/scale": "mixer_layer_norm", "ffn_norm/scale": "final_layer_norm", "attn/q/kernel": "mixer.q_proj"}
BLOCK |= {"attn/k/kernel": "mixer.k_proj", "attn/v/kernel": "mixer.v_proj", "attn/o/kernel": "mixer.out_proj"}
BLOCK |= {"ffn/gate/kernel": "ffn.fc1", "ffn/up/kernel": "ffn.gate", "ffn/down/kernel": "ffn.fc2"}
TOP = {"embed/tokens": "embed_tokens", "norm/scale": "layer_norm", "head/kernel": "output_projection"}
TOP |= {"shared/1/norm/scale": "cross_decoder.kv_layer_norm"}
TOP |= {"shared/1/k/kernel": "cross_decoder.k_proj", "shared/1/v/kernel": "cross_decoder.v_proj"}


def matrix(name, x):
    """Kernels as [out, in]."""
    if x.ndim == 1 or name in ("embed/tokens", "head/kernel"):
        return x
    return x.reshape(-1, x.shape[-1]).T if name.endswith("o/kernel") else x.reshape(x.shape[0], -1).T


def published_names(params):
    out = {}
    for path, x in paths(params):
        if path in TOP:
            out[f"{TOP[path]}.weight"] = matrix(path, np.asarray(x))
            continue
        _, stack, _, name = path.split("/", 3)
        for i, own in enumerate(np.asarray(x)):
            out[f"{('self', 'cross')[int(stack)]}_decoder.layers.{i}.{BLOCK[name]}.weight"] = matrix(name, own)
    return out


def test_logits_are_those_of_the_definition():
    """Past the window, padded on the left, and through the caches with weights laid out for decoding."""
    params, rng = noisy(model_params(SPEC), 0.2), np.random.default_rng(5)
    rows = [rng.integers(0, 61, n) for n in (17, 11)]
    wanted = [published.yoco(published_names(params), row, 6, 6, 2, 5) for row in rows]
    ids, mask = (np.stack([np.pad(x, (17 - len(x), 0)) for x in xs]) for xs in (rows, [r * 0 + 1 for r in rows]))
    got = np.asarray(jaxllm.logits(SPEC, params, ids, mask))
    for logits, want in zip(got, wanted, strict=True):
        np.testing.assert_allclose(logits[-len(want) :], want, rtol=0, atol=1e-4)
    made = jaxllm.generate(SPEC, prepare(params, SPEC, Runtime()), [rows[0][:7].tolist()], max_new_tokens=12).ids()[0]
    whole = published.yoco(published_names(params), np.concatenate([rows[0][:7], made]), 6, 6, 2, 5)
    assert made == whole[6:-1].argmax(-1).tolist()


def test_published_size():
    """2.83 billion parameters without embeddings (appendix D) with gated retention, whose layers have two more
    projections each: of the output's gate [D, D] and of the decay [D, N]."""
    spec = yoco_3b()
    ours = info(spec).parameters["total"] - 2 * spec.vocab * spec.dim
    assert round((ours + 13 * (3072 * 3072 + 3072 * 24)) / 1e9, 2) == 2.83


@pytest.mark.parametrize(("tokens", "times"), [(4096, 2), (32_768, 11), (2**20, 25)])
def test_one_cache_for_half_of_the_layers(tokens, times):
    """Beside a decoder of as many layers with the same grouped heads; the windows' part does not grow."""
    spec = yoco_3b()
    plain = replace(spec, stacks=decoder(spec.stacks[1].pattern[0], layers=26))
    small, large = info(spec, tokens), info(plain, tokens)
    windows, once = 13 * 2 * 1024 * 3072 * 2, 2 * 8 * 128 * 2
    assert small.kv_bytes_context == windows + tokens * once
    assert small.kv_bytes_next == once == large.kv_bytes_next // 26
    assert large.kv_bytes_context // small.kv_bytes_context == times


def test_the_cache_is_written_once():
    params, ids = noisy(model_params(SPEC), 0.2), jnp.arange(18).reshape(2, 9)
    caches = cache.init(SPEC, 2, 16, jnp.float32)
    assert [[kv.k.shape for kv in stack] for stack in caches] == [[(3, 2, 6, 5, 8)], [(1, 2, 2, 16, 8)]]
    rows = forward(params, SPEC, inputs(ids), Runtime(), cache.init(SPEC, 2, 0, jnp.float32)).rows
    assert [[new.k.shape for new in stack] for stack in rows] == [[(3, 2, 6, 9, 8)], [(1, 2, 2, 9, 8)]]


def test_what_cannot_be_shared_or_written_is_refused():
    stack = SPEC.stacks[1]
    block = stack.pattern[0]
    other = replace(block, attn=replace(block.attn, kv_heads=3))
    with pytest.raises(ValueError, match="need one and the same GQA"):
        Stack((block, other), 2, RMSNorm())
    latent = MLA(4, None, 8, 8, 4, 8, block.attn.position, RMSNorm())
    with pytest.raises(ValueError, match="need one and the same GQA"):
        Stack((replace(block, attn=latent),), 2, RMSNorm())
    with pytest.raises(ValueError, match=r"no known family's config\.json expresses spec 'tiny'"):
        family_of_spec(SPEC)
