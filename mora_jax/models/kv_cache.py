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
        keys: `[L, B, S, kv_heads, head_dim]`, rotated.
        values: the same shape.
        segments: int32 `[B, S]`, 0 where the slot is empty or padding.
        positions: int32 `[B, S]`.
        length: int32 scalar, the slots that are used (of S).
    """

    keys: jax.Array
    values: jax.Array
    segments: jax.Array
    positions: jax.Array
    length: jax.Array

    @property
    def max_length(self) -> int:
        """The number of slots, S."""
        return self.keys.shape[2]


@dataclasses.dataclass(frozen=True)
class CacheSlot:
    """Where a layer writes keys and values: `[layer, :, length:length + T]` of `[L, B, S, G, H]` arrays."""

    keys: jax.Array
    values: jax.Array
    layer: jax.Array
    length: jax.Array

    def write(self, keys: jax.Array, values: jax.Array) -> CacheSlot:
        """The slot with `keys` and `values` `[B, T, G, H]` written."""
        zero = jnp.zeros_like(self.length)  # indices of one type, with float64 on too
        start = (self.layer.astype(zero.dtype), zero, self.length, zero, zero)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, keys[None].astype(self.keys.dtype), start),
            values=jax.lax.dynamic_update_slice(self.values, values[None].astype(self.values.dtype), start),
        )

    def read(self) -> tuple[jax.Array, jax.Array]:
        """This layer's keys and values, `[B, S, G, H]` each."""
        return self.keys[self.layer], self.values[self.layer]


def empty_cache(config: DecoderConfig, batch_size: int, max_length: int, dtype: jnp.dtype) -> Cache:
    """A cache with `max_length` free slots for each of `batch_size` rows."""
    if batch_size < 1 or max_length < 1:
        raise ValueError(f"a cache needs at least one row and one slot, got {batch_size} rows of {max_length}")
    shape = (config.num_layers, batch_size, max_length, config.num_kv_heads, config.head_dim)
    slots = jnp.zeros((batch_size, max_length), dtype=jnp.int32)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        segments=slots,
        positions=jnp.zeros_like(slots),  # its own buffer, so that the whole cache can be donated
        length=jnp.zeros((), dtype=jnp.int32),
    )
