"""The key/value cache of generation."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from mora_jax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far. A pytree: pass it through `jax.jit`, donate it, shard it.

    Layers with linear attention have in their place the inputs of the convolution, `[L, B, window - 1, C]`, and the
    state, float32 `[L, B, value_heads, key_dim, value_dim]`. Layers that use those of others have `[L, B, 0]`.

    Attributes:
        keys: `[L, B, kv_heads, S, head_dim]`, rotated; where layers are of several kinds one for each of their stacks;
            or for each layer `[B, kv_heads, S, head_dim]` (`unstacked`).
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

    @property
    def stacks(self) -> list[tuple[jax.Array, jax.Array]]:
        """Keys and values of each stack of layers."""
        if isinstance(self.keys, tuple):
            return list(zip(self.keys, self.values, strict=True))
        return [(self.keys, self.values)]  # type: ignore[list-item]

    def with_stacks(self, stacks: list[tuple[jax.Array, jax.Array]]) -> Cache:
        """With other keys and values of each stack."""
        keys, values = zip(*stacks, strict=True)
        alone = not isinstance(self.keys, tuple)
        return dataclasses.replace(self, keys=keys[0] if alone else keys, values=values[0] if alone else values)

    def unstacked(self) -> Cache:
        """The cache of layers of one kind with an array for each, as `UnstackedLayers` write it in place."""
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

    def put(self, keys: jax.Array, values: jax.Array) -> CacheSlot:
        """The slot with all that it holds of this layer replaced."""

        def written(stored: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(stored.dtype)
            return new if self.layer is None else jax.lax.dynamic_update_index_in_dim(stored, new, self.layer, 0)

        return dataclasses.replace(self, keys=written(self.keys, keys), values=written(self.values, values))

    def held(self) -> tuple[jax.Array, jax.Array]:
        """All that it holds of this layer."""
        return (self.keys, self.values) if self.layer is None else (self.keys[self.layer], self.values[self.layer])

    def read(self) -> tuple[jax.Array, jax.Array]:
        """This layer's keys and values, `[B, S, G, H]` each."""
        keys, values = self.held()
        return keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)


@dataclasses.dataclass(frozen=True)
class KeySlot:
    """Keys and values that a layer leaves to others, or that these find, `[B, T, G, H]` each: without a cache."""

    keys: jax.Array | None = None
    values: jax.Array | None = None

    def write(self, keys: jax.Array, values: jax.Array) -> KeySlot:
        """The slot with a layer's keys and values."""
        return KeySlot(keys, values)

    def read(self) -> tuple[Any, Any]:
        """Keys and values."""
        return self.keys, self.values


def empty_cache(config: DecoderConfig, batch_size: int, max_length: int, dtype: jnp.dtype) -> Cache:
    """A cache with `max_length` free slots for each of `batch_size` rows."""
    if batch_size < 1 or max_length < 1:
        raise ValueError(f"a cache needs at least one row and one slot, got {batch_size} rows of {max_length}")
    stacks = []
    for stack in itertools.chain(*config.runs):
        delta, size = stack.delta, (stack.num_layers, batch_size)
        if stack.keys_of is not None:
            pair = [jnp.zeros((*size, 0), dtype) for _ in range(2)]
        elif delta is None:
            pair = [jnp.zeros((*size, stack.num_kv_heads, max_length, stack.head_dim), dtype) for _ in range(2)]
        else:
            inputs = 2 * delta.key_heads * delta.key_dim + delta.value_heads * delta.value_dim
            state = jnp.zeros((*size, delta.value_heads, delta.key_dim, delta.value_dim), jnp.float32)
            pair = [jnp.zeros((*size, delta.window - 1, inputs), dtype), state]
        stacks.append(pair)
    keys, values = zip(*stacks, strict=True)
    slots = jnp.zeros((batch_size, max_length), dtype=jnp.int32)
    return Cache(
        keys=keys if config.differing else keys[0],
        values=values if config.differing else values[0],
        segments=slots,
        positions=jnp.zeros_like(slots),  # its own buffer, so that the whole cache can be donated
        length=jnp.zeros((), dtype=jnp.int32),
    )
