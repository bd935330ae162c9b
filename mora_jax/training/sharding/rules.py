"""Where arrays live: the table from logical axes to mesh axes, and what follows from it for every array.

Every parameter names its logical axes (`axes` in its metadata). Three things follow for it:

- *stored*: matrices are sharded along `fsdp`, `expert`, `context` and `tensor`, so no device holds the whole base.
  Gradients and optimizer states are sharded like the parameters they belong to.
- *used*: inside the layer that needs it a matrix is gathered along `fsdp`, `expert` and `context` and stays sharded
  along `tensor`; those of experts stay with the devices of `expert` too.
- rows of a batch are sharded along `data`, `fsdp` and `expert`, and so is the residual stream: devices that held the
  same rows would compute attention and everything else beside the experts as often. With `context` each row is sharded
  along its length as well: it is folded into that many shorter rows, which only attention puts together again
  (models/attention/ring.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import with_sharding_constraint as constrain
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mora_jax.adapters.base import AdapterParam, FullParam
from mora_jax.errors import InputError
from mora_jax.models.attention.ring import HeadShards, Ring
from mora_jax.models.partitioning import Partitioner, lay_kernels
from mora_jax.training.sharding.mesh import with_all_axes
from mora_jax.training.state import dotted

Array = jax.Array
Axes = tuple[str | None, ...]

# Logical axis of an array → mesh axes. A LoRA rank is never sharded; the square matrix of MoRA is sharded along `fsdp`
# in storage alone, where it pays: its optimizer state is as large as LoRA's.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "layers": (),
    "embed": ("expert", "fsdp", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "q_per_kv": (),
    "head_dim": (),
    "mlp": ("tensor",),
    "delta": (),
    "layer_inputs": (),
    "window": (),
    "gate_up": (),
    "experts": ("expert", "tensor"),
    "expert_mlp": (),
    "router": (),
    "rank": (),
    "square_in": (),
    "square_out": ("expert", "fsdp", "context"),
    "slots": (),
    "rows": (),
}
_GATHERED = ("expert", "fsdp", "context")  # the mesh axes along which a layer gathers its weights
_CONTEXT = "context"
_ADAPTER_AXES = frozenset({"rank", "square_in", "square_out"})


@dataclass(frozen=True)
class Placement:
    """A mesh, and which logical axes of a model stay whole on it. Hashable, so that a compiled function can hold it.

    Attributes:
        mesh: with the axes `data`, `fsdp`, `tensor`, `context` and `expert`.
        undivided: logical axes that don't divide over `tensor`, with the size that doesn't.
    """

    mesh: Mesh
    undivided: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, mesh: Mesh, *states: nnx.State) -> Placement:
        """For the states of a split model (their arrays may be shapes alone), and a mesh, which may lack axes.

        An axis is sharded along `tensor` in every array that has it or in none: query heads of a kernel and of the
        adapter beside it would else lie on different devices.

        Raises:
            InputError: there are no experts for the axis `expert`, or it doesn't divide them.
        """
        mesh, sizes = with_all_axes(mesh), dict[str, int]()
        for _, axes, shape in _described(states):
            for axis, size in zip(axes, shape, strict=True):
                if axis is not None and "tensor" in RULES.get(axis, ()):
                    sizes[axis] = math.gcd(sizes.get(axis, 0), size)
        shares = {axis: math.prod(mesh.shape[name] for name in RULES[axis]) for axis in sizes}
        groups, experts = mesh.shape["expert"], sizes.get("experts", 0)
        if groups > 1 and not experts:
            raise InputError(f"mesh.expert={groups} shards experts, and this model has none; use mesh.fsdp")
        if experts % groups:
            raise InputError(f"mesh.expert={groups} doesn't divide this model's {experts} experts; choose a divisor")
        return cls(mesh, tuple(sorted((axis, n) for axis, n in sizes.items() if n % shares[axis])))

    @property
    def partitioner(self) -> Partitioner | None:
        """Itself, or None on one device, where there is nothing to lay out."""
        return self if self.mesh.size > 1 else None

    @property
    def row_shards(self) -> int:
        """Devices among which the rows of a micro-batch are laid."""
        return math.prod(self.mesh.shape[axis] for axis in RULES["batch"])

    @property
    def shards_weights(self) -> bool:
        """Whether weights are sharded at all, and not only rows."""
        return math.prod(self.mesh.shape[axis] for axis in (*_GATHERED, "tensor")) > 1

    def notes(self) -> list[str]:
        """What the mesh can't shard, in words."""
        tensor = self.mesh.shape["tensor"]
        return [
            f"{axis} ({size}) doesn't divide over mesh.tensor={tensor}: every device of that axis computes all of it"
            for axis, size in self.undivided
        ]

    def sharding(self, *entries: Any) -> NamedSharding:
        """A sharding on this mesh."""
        return NamedSharding(self.mesh, PartitionSpec(*(entry or None for entry in entries)))

    def batch(self, dimension: int = 0) -> NamedSharding:
        """Of an array whose axis `dimension` is the rows of a batch."""
        return self.sharding(*(None,) * dimension, RULES["batch"])

    def used(self, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """Of a parameter where it is computed with: gathered along `fsdp`, `expert` and `context`."""
        return self.sharding(*self._cut(axes, shape))

    def stored(self, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """Of a parameter where it is kept, of its gradient and its optimizer state.

        A matrix whose own axis doesn't divide is sharded along another that does, the width first.
        """
        return self.sharding(*self._stored(axes, shape))

    def sharded_output_axis(self, axes: Axes, shape: tuple[int, ...]) -> int:
        """Which axis of a kernel `[in, …]` has to stand at place 1 for its flattened columns to be sharded in blocks.

        Factors of adapters are taken as they are, in slots too.
        """
        if len(axes) < 3 or _ADAPTER_AXES.intersection(axes) or self.mesh.shape["tensor"] == 1:
            return 1
        cut = self._cut(axes, shape)
        return next((i for i, entry in enumerate(cut) if i > 1 and entry), 1)

    def shards_features(self, axes: Axes, shape: tuple[int, ...]) -> bool:
        """See `Partitioner.shards_features`."""
        return self.mesh.shape["tensor"] > 1 and any(self._cut(axes, shape))

    def flattens(self, axes: Axes, shape: tuple[int, ...]) -> bool:
        """See `Partitioner.flattens`."""
        cuts = *self._stored(axes, shape)[2:], *self._cut(axes, shape)[2:]
        return all(self.mesh.shape[name] == 1 for entry in cuts for name in entry)

    def _stored(self, axes: Axes, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
        entries = self._cut(axes, shape)
        if sum(axis != "layers" for axis in axes) < 2:
            return entries  # vectors are small, and needed whole
        held = {name for entry in entries for name in entry}
        gathered = [n for n in _GATHERED if n not in held and (n == "fsdp" or self.mesh.shape[n] > 1)]
        for name in gathered:
            where = [i for i, axis in enumerate(axes) if name in RULES.get(axis or "", ())]
            self._add(entries, shape, name, where)
        if not _ADAPTER_AXES.intersection(axes):
            for name in ("tensor", *gathered):
                wanted = any(name in RULES.get(axis or "", ()) for axis in axes)
                if wanted and not any(name in entry for entry in entries):
                    order = sorted(range(len(axes)), key=lambda i: (axes[i] != "embed", -shape[i]))
                    self._add(entries, shape, name, [i for i in order if axes[i] != "layers"])
        return entries

    def _add(self, entries: list[tuple[str, ...]], shape: tuple[int, ...], name: str, where: list[int]) -> None:
        """Cuts the first of some axes that divides along one more mesh axis, if there is one."""
        for i in where:
            if shape[i] % math.prod(self.mesh.shape[axis] for axis in (*entries[i], name)) == 0:
                entries[i] = (*entries[i], name)
                return

    def _cut(self, axes: Axes, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
        """For each axis of an array the mesh axes along which the table shards it where it is used."""
        entries: list[tuple[str, ...]] = [()] * len(axes)
        undivided = {axis for axis, _ in self.undivided}
        if self.mesh.shape["expert"] > 1 and "experts" in axes:
            entries[axes.index("experts")] = ("expert",)
        where = [i for i, axis in enumerate(axes) if "tensor" in RULES.get(axis or "", ()) and axis not in undivided]
        self._add(entries, shape, "tensor", where)
        return entries

    def rows(self, x: Array, *, folded: bool = False) -> Array:
        """Keeps `x [B, …]` sharded by rows and whole otherwise; rows that can't be shared evenly stay as they are.

        With `folded` these are the shorter rows of `fold`.
        """
        if folded:
            return constrain(x, self.sharding((_CONTEXT, *RULES["batch"])))
        return x if x.shape[0] % self.row_shards else constrain(x, self.batch())

    @property
    def _heads(self) -> str | None:
        """The mesh axis of key/value heads; None where every device has all of them."""
        everywhere = "kv_heads" in dict(self.undivided) or self.mesh.shape["tensor"] == 1
        return None if everywhere else "tensor"

    def head_shards(self, rows: int) -> HeadShards:
        """The devices that share the heads of so many rows; uneven rows are everywhere."""
        return HeadShards(self.mesh, RULES["batch"] if rows % self.row_shards == 0 else (), self._heads)

    def ring(self, rows: int) -> Ring | None:
        """The devices that share each of so many rows; None without the axis `context`, or for uneven rows."""
        if self.mesh.shape[_CONTEXT] == 1 or rows % self.row_shards:
            return None
        return Ring(self.mesh, (_CONTEXT, *RULES["batch"]), self._heads, _CONTEXT)

    def fold(self, x: Array) -> Array:
        """See `Partitioner.fold`."""
        ring = self.ring(x.shape[0])
        if ring is None:
            return x
        rows, length, *rest = x.shape
        share = -(-length // (2 * ring.size)) * 2
        x = jnp.pad(x, [(0, 0), (0, ring.size * share - length), *((0, 0) for _ in rest)])
        x = constrain(x, self.sharding(RULES["batch"], _CONTEXT))
        x = x.reshape(rows, ring.size, share, *rest).swapaxes(0, 1)
        return self.rows(x.reshape(ring.size * rows, share, *rest), folded=True)

    def unfold(self, x: Array, rows: int, length: int) -> Array:
        """See `Partitioner.unfold`."""
        ring = self.ring(rows)
        if ring is None:
            return x
        _, share, *rest = x.shape
        x = self.rows(x, folded=True).reshape(ring.size, rows, share, *rest).swapaxes(0, 1)
        x = constrain(x.reshape(rows, ring.size * share, *rest), self.sharding(RULES["batch"], _CONTEXT))
        return x[:, :length]

    def by_experts(
        self,
        function: Callable[..., Array],
        rows: tuple[Array, ...],
        weights: list[tuple[Array, Axes]],
        *,
        folded: bool = False,
    ) -> Array:
        """See `Partitioner.by_experts`.

        Sorting all rows of a batch would gather them: each device sorts its own, and along `expert` those of its group.
        Rows are gathered there, and results summed to where they came from. Sending each row to the devices of its
        experts alone would need as large a buffer on each, since no token is dropped.
        """
        even = rows[0].shape[0] % self.row_shards == 0
        along = (_CONTEXT, *RULES["batch"]) if folded else RULES["batch"] if even else ()
        undivided = {"tensor"} if "experts" in dict(self.undivided) else set()
        groups = tuple(name for name in RULES["experts"] if self.mesh.shape[name] > 1 and name not in undivided)
        exchanged = "expert" in groups and bool(along)

        def share(*arrays: Array) -> Array:
            if not groups:
                return function(jnp.int32(0), *arrays)
            if exchanged:
                each = (jax.lax.all_gather(array, "expert", tiled=True) for array in arrays[: len(rows)])
                arrays = (*each, *arrays[len(rows) :])
            result = function(jax.lax.axis_index(groups), *arrays)
            if not exchanged:
                return jax.lax.psum(result, groups)
            result = jax.lax.psum_scatter(result, "expert", tiled=True)
            return jax.lax.psum(result, "tensor") if "tensor" in groups else result

        specs = (*(PartitionSpec(along),) * len(rows), *(self.used(axes, array.shape).spec for array, axes in weights))
        mapped = jax.shard_map(share, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec(along), check_vma=False)
        return mapped(*rows, *(array for array, _ in weights))

    def gathered(self, array: Array, axes: Axes) -> Array:
        """A stored parameter where it is used; its gradient goes back to where it is stored."""
        return _gathered(self.used(axes, array.shape), self.stored(axes, array.shape), array)

    def looked_up(self, axes: Axes, shape: tuple[int, int], ids: Array, table: Callable[[Array], Array]) -> Array:
        """`table(ids)`, `[B, T, D]` by rows, for a stored embedding `[V, D]` that is never gathered along D.

        Every device looks its columns up for all the rows of its `fsdp` group; the group then exchanges columns for
        rows.
        """
        columns = self._stored(axes, shape)[1]
        groups = tuple(axis for axis in RULES["batch"] if axis not in columns)
        if not columns or ids.shape[0] % self.row_shards:
            return self.rows(table(ids))
        rows = table(constrain(ids, self.sharding(groups)))
        rows = constrain(rows, self.sharding(groups, None, columns))
        # One exchange after the other, the innermost axis first: the partitioner can't do several in one. Columns that
        # are sharded along `tensor` are gathered, those along `context` become shards of the length, those of `fsdp`
        # and `expert` shards of rows.
        columns = tuple(axis for axis in columns if axis != "tensor")
        rows = constrain(rows, self.sharding(groups, None, columns))
        columns = tuple(axis for axis in columns if axis != _CONTEXT)
        along = (_CONTEXT,) if self.ring(ids.shape[0]) and rows.shape[1] % self.mesh.shape[_CONTEXT] == 0 else ()
        rows = constrain(rows, self.sharding(groups, along, columns))
        for name in reversed(columns):
            columns = columns[: columns.index(name)]
            groups = tuple(axis for axis in RULES["batch"] if axis not in columns)
            rows = constrain(rows, self.sharding(groups, along, columns))
        return rows

    def table(self, *states: nnx.State) -> dict[str, NamedSharding]:
        """The stored sharding of every array of a split model, by dotted path."""
        return {name: self.stored(axes, shape) for name, axes, shape in _described(states)}


def _described(states: tuple[nnx.State, ...]) -> Iterator[tuple[str, Axes, tuple[int, ...]]]:
    """Dotted path, logical axes and shape of every array."""
    for state in states:
        for path, variable in nnx.to_flat_state(state):
            shape = tuple(variable.get_value().shape)
            yield dotted(path), axes_of(variable), shape


def axes_of(variable: nnx.Variable) -> Axes:
    """The logical axes of an array. One without names is never sharded, but for the matrices of a user's own model: the
    largest axis of each counts as its width."""
    shape, names = tuple(variable.get_value().shape), variable.get_metadata().get("axes")
    if names:
        return tuple(names)
    adapter = isinstance(variable, AdapterParam) and not isinstance(variable, FullParam)
    if adapter or not isinstance(variable, nnx.Param) or len(shape) < 2:
        return (None,) * len(shape)
    width = shape.index(max(shape))
    return tuple("embed" if axis == width else None for axis in range(len(shape)))


def _gathered(used: NamedSharding, stored: NamedSharding, array: Array) -> Array:
    @jax.custom_vjp
    def gather(array):
        return constrain(array, used)

    gather.defvjp(lambda array: (constrain(array, used), None), lambda _, gradient: (constrain(gradient, stored),))
    return gather(array)


def placed(mesh: Mesh, model: nnx.Module, *, flat: bool | None = None) -> Placement:
    """The placement of a model, whose kernels take the form that they have on the mesh (see `lay_kernels`)."""
    lay_kernels(model, flat=False if mesh.shape["tensor"] > 1 else flat)  # that shards the axes of outputs
    return Placement.of(mesh, nnx.state(model))


def base_shardings(mesh: Mesh, model: nnx.Module) -> Callable[[nnx.Variable], NamedSharding]:
    """Where each parameter of a base (of shapes alone) is stored on a mesh; kernels take their form there."""
    placement = placed(mesh, model)
    return lambda variable: placement.stored(variable.get_metadata()["axes"], tuple(variable.shape))
