"""Segment ids, the positions they imply, and checks on token ids."""

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.errors import InputError


def default_positions(segment_ids: jax.Array) -> jax.Array:
    """How many earlier tokens of the row belong to the same segment as each token.

    For contiguous segments this restarts at 0 with each of them. It is also right for a padding mask with
    holes and for left padding: padding never counts.

    Args:
        segment_ids: int `[B, T]`.

    Returns:
        int32 `[B, T]`.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    earlier = jnp.tri(segment_ids.shape[1], k=-1, dtype=bool)
    return jnp.sum(same & earlier, axis=-1, dtype=jnp.int32)


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
