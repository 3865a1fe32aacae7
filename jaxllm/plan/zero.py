"""What a training step holds under ZeRO stages 0-3, by a formula that counts arrays.

    arguments = 12 P_stored + 24 tokens      fp32 masters, two moments (less with fewer bits, or offloaded), the batch
    temporary = weights + accumulators + saved + streamed + max(layer, loss)    all bytes per chip

P is taken parameter by parameter from the layout's own tables (`sharding.partition`, `sharding.storage`). The heap is
at its greatest either while the backward pass is in a layer or while it is in the loss; everything else lives through
both. How many arrays `layer` and `loss` count was read from compiled programs (stages 2 and 3, one model), then held
fixed for every other cell.
`benchmarks/zero_memory.py` holds the formula against the TPU compiler.

(Rajbhandari et al. 2020, §3; activations under full recomputation: Chen et al. 2016.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from jaxllm.cache import widths
from jaxllm.config import GLU, Block, MoE
from jaxllm.experiment import Experiment
from jaxllm.flops import score_width
from jaxllm.params import Param
from jaxllm.plan.info import declared, ffn_width, require_formula
from jaxllm.plan.saved import WIDTH, saved_bytes
from jaxllm.sharding import Layout, partition, shares, storage
from jaxllm.train.optimizer import bytes_of_state

Size = Callable[[Param], int]


@dataclass(frozen=True)
class StepBytes:
    """Bytes per chip.  c: bytes of the compute dtype; t: tokens of a micro-batch on a chip.

    state: 12 for each parameter a chip stores: fp32 master and two moments; less with `optimizer.masters`, `moments`,
        and without the moments where they lie on the host.
    streamed: the moments of the largest parameter stored, where they do: while it is updated.
    batch: six arrays of 4-byte numbers, for all micro-batches.
    weights: c for each parameter that is multiplied, whole in stages 0-2, sharded in stage 3, where XLA casts the whole
        stack before the scan and gathers layer by layer (without recomputation it keeps what it gathered). The head is
        sharded from stage 1 on, and gathered chunk by chunk. An embedding that is only looked up is not among them.
    accumulators: 4 for each parameter stored, if there is more than one micro-batch; they add up in fp32.
    saved: what layers keep by name (`saved.py`): under full recomputation c t D each, their inputs. Of names that are
        offloaded what two layers keep: one is on its way to or from the host, one in use.
    layer: the gradients made so far (all but the embedding's, at worst), and what one layer's backward pass works with.
    loss: the head's gradient, and what one chunk of the vocabulary works with.
    """

    state: int
    batch: int
    weights: int
    accumulators: int
    saved: int
    layer: int
    loss: int
    streamed: int

    @property
    def arguments(self) -> int:
        """State, which is donated, and batch."""
        return self.state + self.batch

    @property
    def temporary(self) -> int:
        """The heap at its greatest."""
        return self.weights + self.accumulators + self.saved + self.streamed + max(self.layer, self.loss)


def step_bytes(exp: Experiment, devices: int) -> StepBytes:
    """The formula for an experiment's step on so many chips.

    It speaks of flash attention; another kernel works with more. Under `runtime.remat` "full" it is within 10 % of the
    compiler; what other policies keep is the compiler's choice in part. Raises ValueError for layouts with stages.
    """
    layout = exp.runtime.layout or Layout()
    require_formula(layout)
    sizes = layout.sizes(devices)
    stored, used = elements(layout, sizes)
    params = declared(exp.model)
    looked_up = {path for path in params if path.startswith("embed/") and not (exp.model.tied and "tokens" in path)}
    multiplied = [p for path, p in params.items() if path not in looked_up]
    head = params["embed/tokens" if exp.model.tied else "head/kernel"]

    c = WIDTH[exp.runtime.compute_dtype]
    t = exp.batch_size * exp.data.context // (shares(sizes) * sizes["sequence"] * exp.accumulate)
    gradient = _gradient(layout, head, c, stored, used)
    gathers = layout.zero == 3 and exp.runtime.remat != "none"  # else the gathered copy is kept for the backward pass
    held = [(stored(p), *bytes_of_state(exp.optimizer, p)) for p in params.values()]
    return StepBytes(
        state=round(sum((master + (0 if layout.offload else moments)) * n for n, master, moments in held)),
        batch=24 * t * exp.accumulate,
        weights=c * sum(stored(p) if gathers or (layout.zero and p is head) else used(p) for p in multiplied),
        accumulators=4 * sum(map(stored, params.values())) if exp.accumulate > 1 else 0,
        saved=t * _saved(exp),
        layer=sum(map(gradient, multiplied)) + max(_layer(exp, b, t, c, sizes) for b in _blocks(exp)),
        loss=gradient(head) + _loss(exp, t, c, sizes["tensor"]),
        streamed=round(max(moments * n for n, _, moments in held)) if layout.offload else 0,
    )


def elements(layout: Layout, sizes: Mapping[str, int]) -> tuple[Size, Size]:
    """Elements of a parameter that a chip stores, and that it multiplies: the products of its shards' shape."""

    def ways(spec: PartitionSpec) -> int:
        names = [name for axes in spec for name in ((axes,) if isinstance(axes, str) else axes or ())]
        return math.prod(sizes[name] for name in names)

    def stored(p: Param) -> int:
        return math.prod(p.shape) // ways(storage(p, layout, sizes))

    def used(p: Param) -> int:
        return math.prod(p.shape) // ways(partition(p.axes, p.shape, layout, sizes))

    return stored, used


def _gradient(layout: Layout, head: Param, c: int, stored: Size, used: Size) -> Size:
    """Bytes of a micro-batch's gradient, in the dtype of what the loss is differentiated by.

    Stages 1 and 2 differentiate by the gathered copy, in the compute dtype, but the head by its fp32 master; 0 and 3 by
    the fp32 masters. Whole in stage 0, sharded as it is made in the others.
    """
    size = used if layout.zero == 0 else stored
    return lambda p: (c if layout.zero in (1, 2) and p is not head else 4) * size(p)


def _blocks(exp: Experiment) -> list[Block]:
    return [block for stack in exp.model.stacks for block in stack.pattern]


def _saved(exp: Experiment) -> int:
    """Bytes per token over all layers, and of what is offloaded those of two layers: one on its way, one in use."""
    places = [(block, stack.repeats) for stack in exp.model.stacks for block in stack.pattern]
    sizes = [(n, *saved_bytes(block, exp.model, exp.data.context, exp.runtime)) for block, n in places]
    return sum(n * here for n, here, _ in sizes) + 2 * max(there for _, _, there in sizes)


def _layer(exp: Experiment, block: Block, t: int, c: int, sizes: Mapping[str, int]) -> int:
    """One layer recomputed and differentiated, its weights' gradients last, so that their operands live to the end.

    5 t D: its input, both norms' results, the stream between attention and ffn, the stream's gradient.
    4 t (N + K) H: q, k, v, the output, and their gradients.
    t F for each of the ffn's matrices (their operands: for a GLU gate, up and their product, each or its gradient).
    Its largest matrix twice: gathered (stage 3), and its gradient before it is scattered. One at a time.
    Of a mixture F are the columns of a token's experts, the matrix that of all experts, and tokens are copied to them.
    """
    D, tensor = exp.model.dim, sizes["tensor"]
    kv_heads, key, value = widths(block.attn)
    heads = score_width(block.attn) // 2 + kv_heads * (key + value) // 2
    ffn, copies = block.ffn, block.ffn.router.top_k if isinstance(block.ffn, MoE) else 0
    one = ffn.expert if isinstance(ffn, MoE) else ffn
    columns = ffn_width(ffn) * (3 / 2 if isinstance(one, GLU) else 2)
    columns_of_matrix = one.hidden * (ffn.experts if isinstance(ffn, MoE) else 1)
    largest = D * max(columns_of_matrix, score_width(block.attn) // 2) // tensor
    return c * (t * ((5 + 2 * copies) * D + (4 * heads + int(columns)) // tensor) + 2 * largest)


def _loss(exp: Experiment, t: int, c: int, tensor: int) -> int:
    """One chunk of C columns: logits and their gradient [t, C], the head's rows and their gradient [C, D] in the
    compute dtype; the hidden states and the sum of their gradients [t, D] in fp32.
    """
    D, V = exp.model.dim, exp.model.vocab
    C = V // -(-V // exp.runtime.vocab_chunk) // tensor
    return c * (2 * t * C + 2 * C * D) + 4 * 2 * t * D
