"""The shortest path through everything: train, resume, load, stream, quantise, compile for a TPU. CI runs this file
alone on the newest Python and jax."""

import jax
import numpy as np
from tpu_aot import compile_for

import jaxllm
from jaxllm.cli import main
from jaxllm.config import Causal
from jaxllm.kernels.attention import attention
from jaxllm.records import Mask


def test_train_resume_load_and_stream(tmp_path):
    config = tmp_path / "config.py"
    lines = ["from pathlib import Path", "from tiny import experiment", "def config():"]
    config.write_text("\n".join([*lines, f"    return experiment(Path({str(tmp_path)!r}))"]))
    assert main(["train", str(config), "steps=6", "optimizer.decay_steps=12"]) == 0
    assert main(["train", str(config), "steps=12", "optimizer.decay_steps=12"]) == 0
    model = jaxllm.load(tmp_path / "run")
    ids = model.tokenizer.encode("the quick")
    out = jaxllm.logits(model.spec, model.params, [ids])
    assert out.shape == (1, len(ids), 300)
    assert np.isfinite(out).all()
    text = "".join(jaxllm.stream(model, "the quick", max_new_tokens=8))
    got = jaxllm.generate(
        model.spec, model.params, [model.tokenizer.encode("the quick", bos=True)], max_new_tokens=8, eos=model.eos
    )
    assert model.tokenizer.decode(got.ids()[0]) == text
    assert jax.device_count() == 8


def attend(q, k, v):
    return attention(q, k, v, Causal(), Mask(), scale=0.1, backend="tpu")


def test_attention_compiles_for_a_tpu():
    x = jax.ShapeDtypeStruct((1, 512, 2, 128), jax.numpy.bfloat16)
    assert compile_for(attend, (x, x, x), "v5e:2x2").temp_bytes >= 0
