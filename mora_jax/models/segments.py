"""Segment ids, what they imply for each token, and checks on token ids."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mora_jax.errors import InputError


def default_positions(segment_ids: jax.Array | np.ndarray) -> jax.Array:
    """How many earlier tokens of the row belong to the same segment as each token.

    For contiguous segments this restarts at 0 with each of them. It is also right for a padding mask with
    holes and for left padding: padding never counts.

    Args:
        segment_ids: int `[B, T]`.

    Returns:
        int32 `[B, T]`.
    """
    places, first, _, order = _runs(segment_ids)
    return _unsorted(order, places - first)


def segment_lengths(segment_ids: jax.Array | np.ndarray) -> jax.Array:
    """How many tokens of the row belong to the same segment as each token, itself included.

    Args:
        segment_ids: int `[B, T]`.

    Returns:
        int32 `[B, T]`; at padding the number of padding tokens.
    """
    _, first, last, order = _runs(segment_ids)
    return _unsorted(order, last - first + 1)


def _runs(segment_ids: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Each row sorted by segment, so that a segment is one run, whatever lay between its tokens.

    Returns:
        int32 `[B, T]` each, by place in the sorted row: the place, the first and the last place of its run,
        and where its token stood.
    """
    segment_ids = jnp.asarray(segment_ids, jnp.int32)
    places = lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    ids, order = lax.sort((segment_ids, places), dimension=1, num_keys=1, is_stable=True)
    boundary = ids[:, 1:] != ids[:, :-1]
    opens = jnp.pad(boundary, ((0, 0), (1, 0)), constant_values=True)[:, : ids.shape[1]]
    closes = jnp.pad(boundary, ((0, 0), (0, 1)), constant_values=True)[:, : ids.shape[1]]
    first = lax.cummax(jnp.where(opens, places, 0), axis=1)
    last = lax.cummin(jnp.where(closes, places, ids.shape[1] - 1), axis=1, reverse=True)
    return places, first, last, order


def _unsorted(order: jax.Array, values: jax.Array) -> jax.Array:
    """Values by place in the sorted row, back at their tokens; a sort spreads over devices, a scatter may not."""
    return lax.sort((order, values), dimension=1, num_keys=1)[1]


def sorted_by_segment(segment_ids: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Rows whose segments are side by side, each in order, with padding last: `arrays [B, T]` and where tokens stood.

    Returns:
        int32 `[B, T]`, the old place of each token, and the arrays.
    """
    places = lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    last = jnp.where(segment_ids > 0, segment_ids, jnp.iinfo(jnp.int32).max)
    return lax.sort((last, places, *arrays), dimension=1, num_keys=1, is_stable=True)[1:]


def in_order(x: jax.Array, order: jax.Array) -> jax.Array:
    """`x [B, T, …]` with token `order [B, T]` of the same row at each place."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def check_token_ids(input_ids: np.ndarray | jax.Array, vocab_size: int) -> None:
    """Raises InputError when an id has no row in an embedding of `vocab_size` rows.

    Needs concrete ids: call it on data before it goes into a compiled function, where an id outside the
    embedding gives NaN instead.
    """
    ids = np.asarray(input_ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be integers, got {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids.max() if ids.max() >= vocab_size else ids.min()
        raise InputError(f"token id {bad} is outside the embedding: ids go from 0 to {vocab_size - 1}")
