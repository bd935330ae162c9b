"""The mesh: how many devices lie along each of its axes, and which rows they share.

Of several processes each can reach its own devices alone: arrays are placed accordingly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from mora_jax.errors import InputError
from mora_jax.training.config.schema import MeshConfig

AXES = ("data", "fsdp", "tensor", "context", "expert")


def mesh_shape(config: MeshConfig, batch_rows: int, available: int | None = None) -> tuple[int, ...]:
    """Devices along each of `AXES`; the axis that is -1 takes the rest.

    Where `mesh.data` is -1 nobody asked for a number: it is then the largest that shares the rows evenly, though that
    may leave devices idle.

    Args:
        config: the section `mesh`.
        batch_rows: rows of a micro-batch, which `data` × `fsdp` × `expert` devices share.
        available: devices there are; None: those of this run. Several processes have to use all their devices.

    Raises:
        InputError: the sizes don't fit the devices, or the rows don't fit the sizes.
    """
    available = jax.device_count() if available is None else available
    processes = jax.process_count()
    sizes = {name: getattr(config, name) for name in AXES}
    names = (name for name in AXES if name not in ("context", "expert") or sizes[name] != 1)
    asked = ", ".join(f"mesh.{name}={sizes[name]}" for name in names)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        # -1 is the default of `data`; whoever gives another axis the rest means one device along `data`.
        sizes["data"] = 1 if sizes["data"] == -1 else sizes["data"]
        open_axes = [name for name in open_axes if name != "data"]
    if len(open_axes) > 1:
        raise InputError(f"{asked}: only one axis can take the rest of the {available} devices")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if fixed > available:
        raise InputError(f"{asked} asks for {_plural(fixed)}, but there are {available}")
    if open_axes:
        if available % fixed:
            raise InputError(f"{asked}: {_plural(available)} can't be laid out in rows of {fixed}")
        sizes[open_axes[0]] = available // fixed
    if open_axes == ["data"]:
        rows = sizes["fsdp"] * sizes["expert"]
        shared = [n for n in range(1, sizes["data"] + 1) if batch_rows % (n * rows) == 0]
        sizes["data"] = max(shared, default=sizes["data"])
    if processes > 1 and (config.pmap or math.prod(sizes.values()) < available):
        what = "mesh.pmap knows one process only" if config.pmap else f"{asked} leaves devices idle"
        raise InputError(f"{what}, but {processes} processes with {available} devices take part")
    sharing = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    if batch_rows % sharing:
        raise InputError(
            f"{asked}: {sharing} devices can't share {batch_rows} rows of a micro-batch evenly (data × fsdp × expert "
            f"share them); change train.batch_size, train.micro_batch_size or the mesh"
        )
    return tuple(sizes.values())


def _plural(count: int) -> str:
    return f"{count} device" if count == 1 else f"{count} devices"


def make_mesh(
    data: int,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    expert: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of the first `data` × `fsdp` × `tensor` × `context` × `expert` devices.

    Neighbours along `tensor` lie closest to each other, then those along `context` and `expert`: they talk in every
    layer.

    `devices` may be such as are only described, for compiling without them; None: those of this run.
    """
    count = data * fsdp * tensor * context * expert
    available = jax.devices() if devices is None else devices
    grid = np.array(available[:count]).reshape(data, fsdp, expert, context, tensor)
    return Mesh(grid.transpose(0, 1, 4, 3, 2), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def with_all_axes(mesh: Mesh) -> Mesh:
    """A user's mesh, with those of `AXES` that it lacks at size 1."""
    missing = tuple(name for name in AXES if name not in mesh.shape)
    if not missing:
        return mesh
    devices, types = mesh.devices, (*mesh.axis_types, *(AxisType.Auto,) * len(missing))
    return Mesh(devices.reshape(*devices.shape, *(1,) * len(missing)), (*mesh.axis_names, *missing), axis_types=types)


def put(tree: Any, shardings: Any) -> Any:
    """Places arrays that every process has whole.

    Args:
        tree: arrays, the same on every process.
        shardings: a tree of the same structure.
    """
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return jax.device_put(tree, shardings)
    return jax.tree.map(_put_whole, tree, shardings)


def _put_whole(array: Any, sharding: NamedSharding) -> jax.Array:
    """`device_put` would compare the values of all processes first, which costs a gather of every array."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.device_put(array, sharding)  # in place already, or moved between devices
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        bits = _put_whole(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(array))
    values = np.asarray(array)
    # Copies: shards of what training changes are donated, and must not lie in the memory of `array`.
    return jax.make_array_from_callback(values.shape, sharding, lambda index: np.array(values[index]))


def rows_here(sharding: NamedSharding, rows: int) -> tuple[int, ...] | None:
    """Which of the rows `[micro-batches, rows, …]` lie on this process's devices, ascending; None for all."""
    if sharding.is_fully_addressable:
        return None
    numbers: set[int] = set()
    for index in sharding.addressable_devices_indices_map((1, rows)).values():
        assert index is not None, "a sharding of an array with axes gives their spans"
        numbers.update(range(*index[1].indices(rows)))
    return tuple(sorted(numbers))


def put_rows(batch: dict[str, np.ndarray], sharding: NamedSharding, here: tuple[int, ...] | None, rows: int) -> Any:
    """Places a batch of which this process has some rows.

    `jax.make_array_from_process_local_data` would do where no processes share a part of their rows alone.

    Args:
        batch: arrays `[micro-batches, rows of this process, …]`.
        sharding: of the whole.
        here: which rows of each micro-batch these are, as `rows_here` gave them.
        rows: of a whole micro-batch.
    """
    if here is None:
        return jax.device_put(batch, sharding)
    place = {row: i for i, row in enumerate(here)}

    def whole(array: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            first, last, _ = index[1].indices(rows)
            # Rows of a shard are neighbours, and so they are among this process's.
            return array[index[0], place[first] : place[first] + last - first]

        return jax.make_array_from_callback((array.shape[0], rows, *array.shape[2:]), sharding, shard)

    return {name: whole(array) for name, array in batch.items()}
