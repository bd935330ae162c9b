"""The decoder's slot for an output head of its own: a table `[V, D]`, perhaps adapted.

Seen as a matrix it maps D features to V logits. Losses take the table whole, in chunks of tokens, so an adapter here is
added to the table, in float32, once a step; its dropout does not act.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.adapter import Adapter

Array = jax.Array


class OutputHead(nnx.Module):
    """A frozen, perhaps adapted, table of output weights.

    Attributes:
        kernel: `[V, D]`, as in files.
        path: HuggingFace module path.
        adapter: on the matrix `[D, V]`, or None.
    """

    def __init__(self, table: Array, *, path: str):
        """Takes the `table`, logical axes `("vocab", "embed")`."""
        self.kernel = nnx.Param(table, axes=("vocab", "embed"))
        self.path = path
        self.adapter: Any = nnx.data(None)

    def table(self) -> Array:
        """The table `[V, D]`: as stored, or float32 where an adapter is added."""
        kernel = self.kernel[...]
        if self.adapter is None:
            return kernel
        matrix = kernel.astype(jnp.float32).T
        return self.adapter.merged(matrix, self.adapter.gains(matrix)).T

    def put_adapter(self, adapter: Adapter, rngs: nnx.Rngs | None) -> None:
        """Adds `adapter` to a head that has none."""
        self.adapter = adapter

    def take_adapter(self) -> None:
        """Takes the adapter off."""
        self.adapter = nnx.data(None)
