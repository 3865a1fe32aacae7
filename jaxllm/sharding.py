"""Where arrays live: one mesh, and rule tables from logical axes to mesh axes.

A `Layout` is a value: the sizes of the mesh axes, a rule table, and a ZeRO stage. A new layout is a new table, not an
edit of the model. Two tables follow from it:

    compute   how a weight lies while it is multiplied (tensor parallelism only)
    storage   how fp32 masters and optimiser moments lie: compute, plus the "data" axis from ZeRO stage 1 on

    stage 0   everything replicated over data
    stage 1   storage sharded; one compute-dtype copy of the layers gathered per step
    stage 2   the same: XLA shards stage 1's gradients as they are made too, asked or not, so both are asked for
    stage 3   storage sharded; each layer gathered as it is used, its gradient scattered as it is made (FSDP)

(Rajbhandari et al. 2020.) The gradient's layout is set where a weight is used, by the one custom_vjp of this file:
annotating only the optimiser's state makes XLA gather fp32 updates instead.

Arrays are placed by PartitionSpec on the *context mesh* (`jax.set_mesh`), so that the same code runs inside the
`shard_map` of the pipeline: an axis that a `shard_map` has taken is not on the mesh any more (`mesh_sizes`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxllm import leaves
from jaxllm.params import Param, ParamTree, map_params

DATA = ("data", "data_y", "data_z")
"""The data axis, along each direction of the chips' torus that it spans (everything on "data" elsewhere).

The TPU compiler turns a reduce-scatter over two directions at once, and a gather over three, into an all-reduce or a
chain of permutes: twice the traffic, and up to half as many cycles again. Axis after axis they stay what they are.
"""

MESH_AXES = ("replica", "stage", *DATA, "expert", "sequence", "tensor")

Rules = tuple[tuple[str, tuple[str, ...]], ...]

RULES: Rules = (
    ("layers", ("stage",)),
    ("batch", ("replica", *DATA, "expert", "stage")),
    ("length", ("sequence",)),
    ("stream", ("sequence",)),
    ("experts", ("expert",)),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("ffn", ("tensor",)),
)
"""An axis that is not named is not sharded. length: tokens of a row; stream: the same, between blocks."""

_SHARDERS = ("stage", "sequence", "expert", *DATA)  # mesh axes over which ZeRO spreads what is stored, major first
_STORAGE_ORDER = ("embed", "ffn", "heads", "kv_heads", "vocab", "head_dim", "rank")


@dataclass(frozen=True)
class Layout:
    """How a program is spread over devices.

    replica, stage, data, expert, sequence, tensor: sizes of mesh axes; `data=None` takes all devices that the others
    leave. Rows are dealt over replica, data, expert and (outside of the pipeline) stage, tokens of a row over sequence.
    zero: the ZeRO stage.  rules: logical axis -> mesh axes.
    replicate_below: parameters with fewer elements per layer stay whole over data: gathering a norm's scale
    costs three small collectives where its gradient's sum costs one.
    context: how the tokens of a split row meet. "ring": keys and values travel (`kernels/ring.py`); "all_to_all":
    heads are split instead inside of attention (Jacobs et al. 2023).
    split_stream: between blocks the tokens of a row are split over tensor too, so that norms and residuals are not
    repeated, and sums over tensor become half as many bytes (Korthikanti et al. 2022, §4.2.2).
    spare: rows that the exchange between experts' devices has room for, as a multiple of a balanced load. More come in
    further rounds; nothing is dropped.
    microbatches: into how many parts the rows go through the stages (`nn/pipeline.py`), at least as many as there are
    stages; None: as many.  groups: of layers that a stage holds; more make fewer idle turns and more transfers.
    offload: the optimiser's moments lie in the host's memory, and come to the device for the update alone.
    """

    data: int | None = None
    tensor: int = 1
    replica: int = 1
    zero: Literal[0, 1, 2, 3] = 3
    rules: Rules = RULES
    replicate_below: int = 2**16
    sequence: int = 1
    expert: int = 1
    context: Literal["ring", "all_to_all"] = "ring"
    split_stream: bool = False
    spare: float = 1.25
    stage: int = 1
    microbatches: int | None = None
    groups: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        if (self.stage > 1 and self.parts < self.stage) or self.groups < 1:
            raise ValueError(
                f"layout: microbatches={self.microbatches} must be at least stage={self.stage}, so that each stage has "
                f"one to work on, and groups={self.groups} at least 1; set microbatches={self.stage} or more, groups=1"
            )

    @property
    def parts(self) -> int:
        """The number of micro-batches that go through the stages; 1 without stages."""
        return 1 if self.stage == 1 else self.stage if self.microbatches is None else self.microbatches

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes that the compute table gives a logical axis."""
        found = dict(self.rules).get(axis or "", ())
        return (*found, "tensor") if axis == "stream" and self.split_stream else found

    def sizes(self, devices: int, torus: Sequence[int] = ()) -> dict[str, int]:
        """Mesh axis -> size for this many devices. Raises ValueError when they do not divide.

        torus: the sides of the torus that the devices form, if they do.
        """
        given = {axis: getattr(self, axis) for axis in MESH_AXES if axis not in DATA}
        others = math.prod(given.values())
        data = devices // others if self.data is None else self.data
        if data * others != devices or data < 1:
            raise ValueError(
                f"layout: data={self.data} x {' x '.join(f'{axis}={n}' for axis, n in given.items())} must be the "
                f"number of devices, {devices}; set data=None to take what is left, the others dividing {devices}"
            )
        along = dict(zip(DATA, _along(data, torus), strict=False))
        return dict.fromkeys(MESH_AXES, 1) | given | along


def shares(sizes: Mapping[str, int]) -> int:
    """Into how many parts the rows of a batch are dealt on a mesh of these sizes."""
    return math.prod(sizes[a] for a in ("replica", *DATA, "expert", "stage"))


def row_unit(layout: Layout, sizes: Mapping[str, int]) -> int:
    """What the rows of a forward must be a multiple of: its shares, and where there are stages its micro-batches'."""
    return math.lcm(shares(sizes), shares(sizes) // sizes["stage"] * layout.parts)


def _along(data: int, torus: Sequence[int]) -> tuple[int, ...]:
    """The data axis cut by the sides of the torus, of which other axes take the last ones; whole where that fails."""
    sides = [n for n in torus if n > 1]
    others, rest = divmod(math.prod(sides), data)
    for i in reversed(range(len(sides))):
        taken = math.gcd(sides[i], others)
        sides[i], others = sides[i] // taken, others // taken
    found = tuple(n for n in sides if n > 1)
    return found if not rest and others == 1 and len(found) <= len(DATA) and found else (data,)


def mesh_sizes() -> Mapping[str, int]:
    """Axis sizes of the context mesh, without those that a `shard_map` around has taken; empty when there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes}


def partition(
    axes: tuple[str | None, ...], shape: tuple[int, ...], layout: Layout, sizes: Mapping[str, int]
) -> PartitionSpec:
    """PartitionSpec of an array whose axes have these logical names, by the compute table.

    Raises ValueError when a mesh axis does not divide heads, ffn, experts or a row's length, or neither divides
    kv_heads nor faces a single one. A vocabulary or a number of layers that does not divide stays whole, as layers do
    that lie in several groups on a stage.
    """
    out: list[tuple[str, ...] | None] = []
    for axis, n in zip(axes, shape, strict=True):
        mesh_axes = tuple(a for a in layout.mesh_axes(axis) if sizes.get(a, 1) > 1)
        cut = math.prod(sizes[a] for a in mesh_axes)
        if n % cut and not (axis in ("vocab", "layers") or (axis == "kv_heads" and n == 1)):
            raise ValueError(
                f"layout: mesh axes {mesh_axes} of size {cut} must divide {axis}={n}; choose a size that divides {n}"
            )
        apart = axis == "layers" and layout.groups > 1
        out.append(mesh_axes if mesh_axes and n % cut == 0 and not apart else None)
    return PartitionSpec(*out)


def require_length(length: int, layout: Layout, sizes: Mapping[str, int]) -> None:
    """Raise ValueError when rows of so many tokens cannot be split as the layout says."""
    partition(("length", "stream"), (length, length), layout, sizes)
    chunks = 2 * sizes["sequence"]
    if layout.context == "ring" and sizes["sequence"] > 1 and length % chunks:
        raise ValueError(
            f"layout: a ring of sequence={sizes['sequence']} devices cuts rows into {chunks} chunks, which must divide "
            f"their length, {length}; the next that they do is {-(-length // chunks) * chunks}, or set "
            'layout.context="all_to_all"'
        )


def storage(param: Param, layout: Layout, sizes: Mapping[str, int]) -> PartitionSpec:
    """PartitionSpec of a master weight and its moments: the compute table, and DATA on one more axis from stage 1 on.

    The data axis goes to the first of embed, ffn, heads, kv_heads, vocab, head_dim, rank that it divides. With it go
    the axes of stages, experts and sequence, which share the batch as well, where all of them divide. Stacked layers
    that cannot lie over stages by their number do so in this way whatever the ZeRO stage.
    """
    spec = partition(param.axes, param.shape, layout, sizes)
    per_layer = math.prod(n for n, a in zip(param.shape, param.axes, strict=True) if a != "layers")
    taken = axes_in(spec)
    over = tuple(a for a in _SHARDERS if sizes.get(a, 1) > 1 and a not in taken)
    if per_layer < layout.replicate_below:
        return spec
    data = tuple(a for a in over if a in DATA)
    staged = tuple(a for a in layout.mesh_axes("layers") if a in over and "layers" in param.axes)
    wishes = (over, (*staged, *data), data, staged) if layout.zero else (staged,)
    for more, axis in itertools.product(wishes, _STORAGE_ORDER):
        if more and axis in param.axes:
            i = param.axes.index(axis)
            used = names_of(spec[i])
            if param.shape[i] % math.prod(sizes[a] for a in (*used, *more)) == 0:
                return PartitionSpec(*spec[:i], (*used, *more), *spec[i + 1 :])
    return spec


def at_work(param: Param, layout: Layout, sizes: Mapping[str, int]) -> PartitionSpec:
    """PartitionSpec of a parameter as it is multiplied: the compute table; layers stay on stages, however stored."""
    spec = partition(param.axes, param.shape, layout, sizes)
    if "layers" not in param.axes:
        return spec
    kept = {*layout.mesh_axes("layers"), *(name for entry in spec for name in names_of(entry))}
    return _without(storage(param, layout, sizes), tuple(a for a in _SHARDERS if a not in kept))


def names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec (which turns a tuple of one into the name)."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def axes_in(spec: PartitionSpec) -> tuple[str, ...]:
    """All mesh axes of a PartitionSpec."""
    return tuple(name for entry in spec for name in names_of(entry))


def ways(axis: str, size: int, layout: Layout | None) -> int:
    """Into how many shards the compute table cuts a logical axis of this size on the context mesh."""
    sizes = mesh_sizes()
    if layout is None or not sizes:
        return 1
    return math.prod(sizes[a] for a in names_of(partition((axis,), (size,), layout, sizes)[0]))


def storage_shardings(tree: ParamTree, layout: Layout, mesh: Mesh) -> Any:
    """NamedSharding per parameter for masters and moments."""
    return map_params(lambda p: NamedSharding(mesh, storage(p, layout, mesh.shape)), tree)


def constrain(x: Array, axes: tuple[str | None, ...], layout: Layout | None) -> Array:
    """Pin an activation's layout by logical axis names; the identity without a layout or a mesh."""
    sizes = mesh_sizes()
    if layout is None or not sizes:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, layout, sizes))


def inside(x: Array, axis: str, layout: Layout | None, *, last: str | None = None) -> Array:
    """Pin what a branch [B, T, ...] multiplies where the stream between branches is split; else the identity.

    Its tokens are gathered where the layout cuts `axis`, that of the branch's weights; where these are whole they stay
    split. Without it XLA gathers some weights over tensor instead, or turns tokens into columns by an all-to-all.
    last: logical name of x's last axis.
    """
    if layout is None or not layout.split_stream:
        return x
    tokens = "length" if "tensor" in layout.mesh_axes(axis) else "stream"
    return constrain(x, ("batch", tokens, *[None] * (x.ndim - 3), last), layout)


Specs = tuple[PartitionSpec, ...]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _relay(w: Array, dtype: DTypeLike, forward: Specs, backward: Specs) -> Array:
    """w in `dtype`, laid out as `forward` says, one after another; its gradient as `backward` does, in w's dtype."""
    return _laid_out(w.astype(dtype), forward)


def _laid_out(x: Array, specs: Specs) -> Array:
    for spec in specs:
        x = jax.lax.with_sharding_constraint(x, spec)
    return x


def _relay_fwd(w: Array, dtype: DTypeLike, forward: Specs, backward: Specs) -> tuple[Array, Array]:
    return _relay(w, dtype, forward, backward), np.zeros((0,), w.dtype)  # type: ignore[return-value]


def _relay_bwd(dtype: DTypeLike, forward: Specs, backward: Specs, like: Array, g: Array) -> tuple[Array]:
    return (_laid_out(g, backward).astype(like.dtype),)


_relay.defvjp(_relay_fwd, _relay_bwd)


def _without(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(tuple(a for a in names_of(entry) if a not in axes) or None for entry in spec))


def _shared(stored: PartitionSpec, used: PartitionSpec) -> bool:
    """Whether a weight is spread over axes that share the batch with DATA, and not multiplied so."""
    return not {"sequence", "expert"}.isdisjoint({*axes_in(stored)} - {*axes_in(used)})


def _gathers(stored: PartitionSpec, used: PartitionSpec) -> Specs:
    """Layouts on the way from `stored` to `used`, so that no gather spans three directions of the torus."""
    three = (_without(stored, DATA[2:]),) if DATA[2] in axes_in(stored) else ()
    return (*three, _without(stored, DATA), used) if _shared(stored, used) else (*three, used)


def _scatters(stored: PartitionSpec, used: PartitionSpec) -> Specs:
    """Layouts of a gradient on the way to `stored`: over what shares the batch with DATA, DATA but its last, all.

    Where three axes of DATA are long, one at a time: over two at once the compiler all-reduces from 64 chips on.
    """
    first = (_without(stored, DATA),) if _shared(stored, used) else ()
    sizes = mesh_sizes()
    wide = DATA[2] in axes_in(stored) and sizes[DATA[0]] * sizes[DATA[1]] >= 64
    one = (_without(stored, DATA[1:]),) if wide else ()
    return (*first, *one, _without(stored, _last(stored)), stored)


def _last(spec: PartitionSpec) -> tuple[str, ...]:
    """The last axis of DATA in it, if there are two."""
    return tuple([a for a in DATA[1:] if a in axes_in(spec)][-1:])


def copies(p: Param, w: Array, axes: tuple[str, ...], layout: Layout) -> tuple[Array, PartitionSpec]:
    """A weight as `use` gives it with two leading axes, a copy for every device along `axes`, and how that lies.

    What a `shard_map` takes whole has a gradient that is all-reduced there. That of copies is summed outside: over all
    axes but DATA's last, where it is scattered as it is summed, then over the last. Forward nothing moves.
    axes: those over which tokens are split; the ones that the weight itself lies on are left out.
    """
    sizes = mesh_sizes()
    used = partition(p.axes, p.shape, layout, sizes)
    stored = used if layout.zero == 0 else storage(p, layout, sizes)
    others = tuple(a for a in axes if a not in axes_in(used))
    last = tuple(a for a in _last(stored) if a in others)
    rest = tuple(a for a in others if a not in last)
    near, far = PartitionSpec(last or None, *used), PartitionSpec(rest or None, last or None, *used)

    def repeated(x: Array, axes: tuple[str, ...]) -> Array:
        return jnp.broadcast_to(x[None], (math.prod(sizes[a] for a in axes), *x.shape))

    scattered = PartitionSpec(last or None, *_scatters(stored, used)[0])
    w = _relay(repeated(w, last), w.dtype, (near,), (scattered,))
    return jax.lax.with_sharding_constraint(repeated(w, rest), far), far


def use(tree: ParamTree, params: Any, layout: Layout | None, dtype: DTypeLike) -> Any:
    """Weights ready to be multiplied: floating arrays in `dtype` and in the compute layout.

    tree: the declaration of `params`.  The gradient that flows back is in the storage layout (whole in stage 0).
    Integer arrays (quantised values) are laid out but not cast; scales and what is declared `exact` stay float32.
    """
    sizes = mesh_sizes()

    def one(p: Param, w: leaves.Weight) -> Any:
        def array(x: Array, axes: tuple[str | None, ...]) -> Array:
            fixed = p.exact or (isinstance(w, leaves.Quantised) and x is w.scale)
            cast = dtype if jnp.issubdtype(x.dtype, jnp.floating) and not fixed else x.dtype
            if layout is None or not sizes:
                return x.astype(cast)
            forward = partition(axes, x.shape, layout, sizes) if axes != p.axes else at_work(p, layout, sizes)
            if layout.zero == 0 or axes != p.axes:
                return _relay(x, cast, (forward,), (forward,))
            stored = storage(p, layout, sizes)
            gathers = _gathers(stored, forward) if layout.zero == 3 else (forward,)
            return _relay(x, cast, gathers, _scatters(stored, forward))

        return leaves.map_arrays(array, w, p.axes, outputs=p.outputs)

    return map_params(one, tree, params)


def lookup(declared: Param, table_VD: leaves.Weight, ids_BT: Array, layout: Layout | None, dtype: DTypeLike) -> Array:
    """`leaves.lookup` that shards: rows [B, T, D] in the batch layout, without gathering the table.

    Where the table's D is spread (ZeRO), each device looks up its slice of D for the rows of all that share it, and an
    all-to-all turns [B, T, D/n] into [B/n, T, D]. Its gradient is then local to the slice: no [V, D] sum exists.
    """
    sizes = mesh_sizes()
    if layout is None or not sizes:
        return leaves.lookup(table_VD, ids_BT, dtype)
    width = names_of(storage(declared, layout, sizes)[1])
    homes = partition(("batch", "length"), ids_BT.shape, layout, sizes)

    def away(n: int) -> list[tuple[str, ...] | None]:
        """Where ids lie while the first n axes of `width` are busy with D."""
        return [tuple(a for a in names_of(home) if a not in width[:n]) or None for home in homes]

    ids_BT = jax.lax.with_sharding_constraint(ids_BT, PartitionSpec(*away(len(width))))
    rows = leaves.lookup(table_VD, ids_BT, dtype)
    for n in range(len(width), 0, -1):  # home along one axis after the other, the minor first: all-to-alls
        rows = jax.lax.with_sharding_constraint(rows, PartitionSpec(*away(n), width[:n]))
    return constrain(rows, ("batch", "stream", None), layout)
