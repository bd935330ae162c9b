"""The key/value cache of generation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from mora_jax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far. A pytree: pass it through `jax.jit`, donate it, shard it.

    Attributes:
        keys: `[L, B, kv_heads, S, head_dim]`, rotated; or for each layer `[B, kv_heads, S, head_dim]` (`unstacked`).
        values: the same shape.
        segments: int32 `[B, S]`, 0 where the slot is empty or padding.
        positions: int32 `[B, S]`.
        length: int32 scalar, the slots that are used (of S).
    """

    keys: jax.Array | tuple[jax.Array, ...]
    values: jax.Array | tuple[jax.Array, ...]
    segments: jax.Array
    positions: jax.Array
    length: jax.Array

    @property
    def max_length(self) -> int:
        """The number of slots, S."""
        return self.segments.shape[1]

    def unstacked(self) -> Cache:
        """The cache with an array for each layer, as `UnstackedLayers` write it in place."""
        return dataclasses.replace(self, keys=tuple(self.keys), values=tuple(self.values))


@dataclasses.dataclass(frozen=True)
class CacheSlot:
    """Where a layer writes keys and values: `[layer, :, :, length:length + T]` of `[L, B, G, S, H]` arrays.

    Where `layer` is None, the arrays `[B, G, S, H]` are those of this layer alone.
    """

    keys: jax.Array
    values: jax.Array
    layer: jax.Array | None
    length: jax.Array

    def write(self, keys: jax.Array, values: jax.Array) -> CacheSlot:
        """The slot with `keys` and `values` `[B, T, G, H]` written."""
        zero = jnp.zeros_like(self.length)  # indices of one type, with float64 on too
        start: tuple[jax.Array, ...] = (zero, zero, self.length, zero)
        if self.layer is not None:
            start = (self.layer.astype(zero.dtype), *start)

        def written(stored: jax.Array, new: jax.Array) -> jax.Array:
            new = new.transpose(0, 2, 1, 3).astype(stored.dtype)
            return jax.lax.dynamic_update_slice(stored, new if self.layer is None else new[None], start)

        return dataclasses.replace(self, keys=written(self.keys, keys), values=written(self.values, values))

    def read(self) -> tuple[jax.Array, jax.Array]:
        """This layer's keys and values, `[B, S, G, H]` each."""
        keys, values = self.keys, self.values
        if self.layer is not None:
            keys, values = keys[self.layer], values[self.layer]
        return keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)


def empty_cache(config: DecoderConfig, batch_size: int, max_length: int, dtype: jnp.dtype) -> Cache:
    """A cache with `max_length` free slots for each of `batch_size` rows."""
    if batch_size < 1 or max_length < 1:
        raise ValueError(f"a cache needs at least one row and one slot, got {batch_size} rows of {max_length}")
    shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
    slots = jnp.zeros((batch_size, max_length), dtype=jnp.int32)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        segments=slots,
        positions=jnp.zeros_like(slots),  # its own buffer, so that the whole cache can be donated
        length=jnp.zeros((), dtype=jnp.int32),
    )
