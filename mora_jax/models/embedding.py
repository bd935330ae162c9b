"""The token embedding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def normal(scale: float, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers drawn in float32, so that one key gives one model in every dtype."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class TokenEmbedding(nnx.Embed):
    """An `nnx.Embed` that looks up first and casts afterwards: a float32 master is never cast whole.

    Attributes:
        embedding: `[V, D]`.
        path: HuggingFace module path.
    """

    def __init__(self, vocab_size: int, features: int, *, scale: float, path: str, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Draws a normal table with standard deviation `scale`."""
        super().__init__(
            vocab_size,
            features,
            dtype=dtype,
            param_dtype=dtype,
            embedding_init=functools.partial(normal, scale),
            embedding_metadata={"axes": ("vocab", "embed")},
            rngs=rngs,
        )
        self.path = path

    def __call__(self, inputs: jax.Array, out_sharding: None = None) -> jax.Array:
        """Rows of `inputs [...]`: `[..., D]`. An id without a row gives NaN, never another token's row."""
        rows = self.embedding[...].at[inputs].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return rows.astype(self.dtype)

    def table(self) -> jax.Array:
        """The table `[V, D]` that a tied output head multiplies with."""
        return self.embedding[...]
