"""Arrays onto devices of one process or of several, each of which can reach its own alone."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


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
    found: set[int] = set()
    for index in sharding.addressable_devices_indices_map((1, rows)).values():
        assert index is not None, "a sharding of an array with axes gives their spans"
        found.update(range(*index[1].indices(rows)))
    return tuple(sorted(found))


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
