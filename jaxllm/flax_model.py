"""Any spec as a Flax module, for those whose code is written around `init` and `apply`.

model = FlaxModel(spec)
variables = model.init(key, tokens_BT)                  # {"params": the same nested dicts as everywhere else}
logits_BTV = model.apply(variables, tokens_BT, attention_mask_BT)

`{"params": jaxllm.load(path).params}` are variables too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxllm.config import Transformer
from jaxllm.params import ParamTree, init
from jaxllm.records import inputs
from jaxllm.runtime import Runtime
from jaxllm.transformer import forward, logits, transformer_params


class FlaxModel(nn.Module):
    """spec: what to compute.  runtime: how."""

    spec: Transformer
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(
        self, tokens_BT: Int[Array, "B T"], attention_mask_BT: Int[Array, "B T"] | None = None, train: bool = False
    ) -> Float[Array, "B T V"]:
        """float32 logits. attention_mask_BT: 0 = padding, on either side.  train: drop out, with the rng "dropout"."""
        tree = transformer_params(self.spec)
        params = {name: self.param(name, partial(_init, part)) for name, part in tree.items()}
        key = self.make_rng("dropout") if train else None
        out = forward(params, self.spec, inputs(tokens_BT, attention_mask_BT), self.runtime, key=key)
        return logits(params, self.spec, out.hidden_BTD, self.runtime)


def _init(part: ParamTree, key: Array) -> Any:
    return init(part, key)
