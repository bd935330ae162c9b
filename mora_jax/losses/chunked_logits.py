"""Work over the vocabulary in chunks of tokens: the logits of a whole batch never exist.

Tokens of weight 0 are moved behind the others and whole chunks of them are skipped, so the vocabulary product costs
what the weighted tokens cost.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Options(NamedTuple):
    """The static part of a sum over tokens.

    Attributes:
        softcap: logits become `softcap · tanh(logits / softcap)`; None for no cap.
        shards: groups of rows that are compacted on their own; the number of devices that share the batch, so that
            no token crosses devices.
        chunk: tokens a chunk and shard.
    """

    softcap: float | None
    shards: int
    chunk: int


def chunk_size(vocab_size: int, tokens: int) -> int:
    """Tokens a chunk: 64 MB of float32 logits, at least 64 tokens and no more than there are."""
    wanted = max(64, (1 << 24) // vocab_size)
    return max(1, min(wanted, tokens))


def pack_weighted_tokens(
    weights: Array, *arrays: Array, vocab_size: int, softcap: float | None, shards: int, chunk: int | None
) -> tuple[Options, tuple[Array, ...]]:
    """Brings tokens of non-zero weight to the front of each shard and fills up the last chunk.

    Args:
        weights: float32 `[B, T]`.
        *arrays: `[B, T, …]`.
        vocab_size: of the output head; chooses the size of a chunk.
        softcap, shards: see `Options`; `shards` divides B.
        chunk: tokens a chunk; None chooses.

    Returns:
        The options, and the weights and arrays as `[shards, tokens, …]`.
    """
    batch, length = weights.shape
    if batch % shards:
        raise ValueError(f"{shards} shards can't share {batch} rows evenly")
    per_shard = batch // shards * length
    options = Options(softcap, shards, chunk or chunk_size(vocab_size, per_shard))
    flat = weights.reshape(shards, per_shard)
    order = jnp.argsort(flat == 0, axis=1, stable=True)
    padding = -per_shard % options.chunk
    order = jnp.pad(order, ((0, 0), (0, padding)))
    # The padding repeats a real token; its weight is 0, so it counts for nothing.
    scales = jnp.take_along_axis(flat, order, axis=1)
    scales = jnp.where(jnp.arange(per_shard + padding) < per_shard, scales, 0.0)

    def moved(array: Array) -> Array:
        array = array.reshape(shards, per_shard, *array.shape[2:])
        return jnp.take_along_axis(array, order.reshape(*order.shape, *(1,) * (array.ndim - 2)), axis=1)

    return options, (scales, *map(moved, arrays))


def used_chunks(options: Options, weights: Array) -> Array:
    """How many chunks hold any token of non-zero weight, over all shards."""
    used = jnp.max(jnp.sum(weights > 0, axis=1))
    return (used + options.chunk - 1) // options.chunk


def take(options: Options, index: Array, *arrays: Array) -> tuple[Array, ...]:
    """Chunk `index` of each array: `[shards, tokens, …]` → `[shards, chunk, …]`."""
    start = index * options.chunk
    return tuple(lax.dynamic_slice_in_dim(array, start, options.chunk, axis=1) for array in arrays)


def put(options: Options, index: Array, array: Array, values: Array) -> Array:
    """The array with chunk `index` replaced, in its own dtype."""
    return lax.dynamic_update_slice_in_dim(array, values.astype(array.dtype), index * options.chunk, axis=1)


def logits(options: Options, hidden: Array, kernel: Array) -> Array:
    """`[shards, chunk, D]`, `[V, D]` → float32 `[shards, chunk, V]`, capped."""
    raw = lax.dot_general(hidden, kernel, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return raw if options.softcap is None else options.softcap * jnp.tanh(raw / options.softcap)


def logits_vjp(options: Options, capped: Array, slope: Array, kernel: Array) -> tuple[Array, Array]:
    """The way back through `logits`.

    Args:
        capped: what `logits` returned.
        slope: float32, the derivative by it.
        kernel: `[V, D]` in the compute dtype.

    Returns:
        The derivative by the uncapped logits, in the compute dtype, and by `hidden`, float32.
    """
    if options.softcap is not None:
        slope = slope * (1.0 - jnp.square(capped / options.softcap))
    slope = slope.astype(kernel.dtype)
    return slope, lax.dot_general(slope, kernel, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def kernel_vjp(slope: Array, hidden: Array) -> Array:
    """The derivative by the kernel, float32 `[V, D]`, from that by the uncapped logits `[shards, chunk, V]`."""
    flat, rows = slope.reshape(-1, slope.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    return lax.dot_general(flat, rows, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
