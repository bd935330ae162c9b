"""Dropout masks that go by the token: the same however a step's rows are laid over micro-batches and devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class TokenDropout(NamedTuple):
    """What the masks of dropout are drawn from.

    Every token has a key of its own, made of the place in the network and the token's number in the step. So a mask
    doesn't depend on which other tokens are computed beside it: in one micro-batch or several, on one device, on a mesh
    that cuts rows along their length or not, or under `pmap`.

    Attributes:
        key: of the place in the network.
        tokens: uint32, the number of each token in the step, shaped like the tokens.
    """

    key: Array
    tokens: Array

    @classmethod
    def of(cls, key: Array, rows: int, length: int, numbers: Array | None = None) -> TokenDropout:
        """For tokens `[rows, length]`.

        Args:
            key: of the step.
            rows, length: of the tokens.
            numbers: int `[rows]`, the number of each row in the step; None: they are all of it, in order.
        """
        numbers = jnp.arange(rows) if numbers is None else numbers
        tokens = numbers.astype(jnp.uint32)[:, None] * jnp.uint32(length) + jnp.arange(length, dtype=jnp.uint32)
        return cls(key, tokens)

    def fold(self, number: Array | int) -> TokenDropout:
        """For one of several places."""
        return self._replace(key=jax.random.fold_in(self.key, number))

    def drop(self, x: Array, rate: float) -> Array:
        """`x [N, in]`, a row for each of the tokens: numbers are left out with probability `rate`, the others scaled up
        so that the sum stays the same on average."""
        keep = 1.0 - rate

        def mask(token: Array) -> Array:
            return jax.random.bernoulli(jax.random.fold_in(self.key, token), keep, x.shape[1:])

        return jnp.where(jax.vmap(mask)(self.tokens.reshape(-1)), x / keep, 0).astype(x.dtype)
