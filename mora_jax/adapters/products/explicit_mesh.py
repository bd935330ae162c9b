"""Adapters on meshes whose axes are Explicit, the default of `jax.make_mesh`.

There the sharding of every array is part of its type, and operations whose result could lie in several ways are
refused: reshapes of a cut axis, contractions over a cut axis in a gradient. So an update is computed with the axes
Auto, and its result placed as the plain layer's output is.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes, reshard


def explicit_axes(*arrays: Any) -> tuple[str, ...]:
    """The names of the Explicit axes of the mesh that arrays are typed with; `()` for other meshes and without one."""
    return next((names for array in arrays if (names := _explicit(jax.typeof(array).sharding))), ())


def _explicit(sharding: Any) -> tuple[str, ...]:
    mesh = sharding.mesh
    return tuple(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)


def placed_like(like: Any, run: Callable[..., Array], *args: Any) -> Array:
    """`run(*args)`, computed with Explicit axes Auto where there are any, and placed like `like`.

    Args:
        like: an array of the result's shape, or its type from `jax.eval_shape`.
        run: reads no arrays but its arguments, since others would be typed with Explicit axes.
        args: trees of arrays.
    """
    sharding = like.sharding if isinstance(like, jax.ShapeDtypeStruct) else jax.typeof(like).sharding
    axes = () if sharding is None else _explicit(sharding)
    return auto_axes(run, axes=axes, out_sharding=sharding)(*args) if axes else run(*args)


def whole(array: Array) -> Array:
    """An array on a mesh with Explicit axes, uncut: what can be reshaped in any way. Others as they are."""
    if not explicit_axes(array):
        return array
    return reshard(array, NamedSharding(jax.typeof(array).sharding.mesh, PartitionSpec()))


def cut_like(array: Array, like: Array) -> Array:
    """The inverse of `whole`: cut over the mesh as `like` is, an array of the same shape."""
    return reshard(array, jax.typeof(like).sharding) if explicit_axes(like) else array
