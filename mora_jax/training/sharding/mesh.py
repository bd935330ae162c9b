"""The mesh: how many devices lie along each of its axes, and which rows they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mora_jax.errors import InputError
from mora_jax.training.config.schema import MeshConfig

AXES = ("data", "fsdp", "tensor", "context")


def mesh_shape(
    config: MeshConfig, batch_rows: int, available: int | None = None, processes: int | None = None
) -> tuple[int, int, int, int]:
    """Devices along `data`, `fsdp`, `tensor` and `context`; the axis that is -1 takes the rest.

    Where `mesh.data` is -1 nobody asked for a number: it is then the largest that shares the rows evenly, though that
    may leave devices idle.

    Args:
        config: the section `mesh`.
        batch_rows: rows of a micro-batch, which `data` × `fsdp` devices share.
        available: devices there are; None: those of this run.
        processes: that have them; None: those of this run. Several have to use all their devices.

    Raises:
        InputError: the sizes don't fit the devices, or the rows don't fit the sizes.
    """
    available = jax.device_count() if available is None else available
    processes = jax.process_count() if processes is None else processes
    sizes = {name: getattr(config, name) for name in AXES}
    named = [name for name in AXES if name != "context" or config.context != 1]
    asked = ", ".join(f"mesh.{name}={sizes[name]}" for name in named)
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
        shared = [n for n in range(1, sizes["data"] + 1) if batch_rows % (n * sizes["fsdp"]) == 0]
        sizes["data"] = max(shared, default=sizes["data"])
    if processes > 1 and (config.pmap or math.prod(sizes.values()) < available):
        what = "mesh.pmap knows one process only" if config.pmap else f"{asked} leaves devices idle"
        raise InputError(f"{what}, but {processes} processes with {available} devices take part")
    sharing = sizes["data"] * sizes["fsdp"]
    if batch_rows % sharing:
        raise InputError(
            f"{asked}: {sharing} devices can't share {batch_rows} rows of a micro-batch evenly (data × fsdp share "
            f"them); change train.batch_size, train.micro_batch_size or the mesh"
        )
    return sizes["data"], sizes["fsdp"], sizes["tensor"], sizes["context"]


def _plural(count: int) -> str:
    return f"{count} device" if count == 1 else f"{count} devices"


def make_mesh(
    data: int, fsdp: int = 1, tensor: int = 1, context: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of the first `data` × `fsdp` × `tensor` × `context` devices.

    Neighbours along `tensor` lie closest to each other, then those along `context`: they talk in every layer.

    `devices` may be such as are only described, for compiling without them; None: those of this run.
    """
    count = data * fsdp * tensor * context
    found = jax.devices() if devices is None else devices
    grid = np.array(found[:count]).reshape(data, fsdp, context, tensor)
    return Mesh(grid.swapaxes(2, 3), AXES, axis_types=(AxisType.Auto,) * 4)
