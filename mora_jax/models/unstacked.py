"""Layers apart from each other, as one token at a time wants them on a CPU.

XLA's CPU backend copies a layer out of a stack before it multiplies with it, which costs more than the product with one
token does. Here every layer has arrays of its own, and matrices lie as `[out, in]`, the form in which its products with
few rows read them fastest.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.expert_projection import ExpertProjection
from mora_jax.adapters.products.matmul import Turned
from mora_jax.adapters.projection import Projection
from mora_jax.adapters.slots import use


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnstackedLayers:
    """A copy of the layers of a decoder.

    Attributes:
        states: for each layer its leaves, kernels `Turned`.
        graphdef: the structure of a layer.
        table: the bits of a bfloat16 embedding, uint16 `[V, D]`; None for others. XLA's CPU backend widens a whole
            bfloat16 table to look up a row.
        adapter_ids: int `[B]`, which of several named adapters each row uses; None: the active one.
    """

    states: tuple[Any, ...]
    graphdef: Any = dataclasses.field(metadata={"static": True})
    table: jax.Array | None = None
    adapter_ids: jax.Array | None = None

    @classmethod
    def of(cls, layers: nnx.Module, embedding: Any) -> UnstackedLayers:
        """Copies stacked `layers`, a `Block` whose kernels are not quantised, and what is looked up in `embedding`."""
        graphdef, state = nnx.split(layers)
        count = jax.tree.leaves(state)[0].shape[0]
        split = [_layer(graphdef, state, jnp.int32(i)) for i in range(count)]
        table = embedding.embedding[...]
        plain = table.dtype == jnp.bfloat16 and getattr(embedding, "adapter", None) is None
        return cls(tuple(state for _, state in split), split[0][0], _bits(table) if plain else None)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows of `table`, bfloat16 `[..., D]` for `ids [...]`; NaN for an id without a row."""
        assert self.table is not None
        nan = jax.lax.bitcast_convert_type(jnp.bfloat16(jnp.nan), jnp.uint16)
        found = self.table.at[ids].get(mode="clip", wrap_negative_indices=False)
        known = ((ids >= 0) & (ids < self.table.shape[0]))[..., None]
        return jax.lax.bitcast_convert_type(jnp.where(known, found, nan), jnp.bfloat16)

    def layer(self, index: int) -> Any:
        """One layer, a `Block` on leaves without layer axis."""
        layer = nnx.merge(self.graphdef, self.states[index])
        if self.adapter_ids is not None:
            use(layer, self.adapter_ids)
        return layer


@jax.jit
def _bits(table: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(table, jnp.uint16)


@functools.partial(jax.jit, static_argnums=0)
def _layer(graphdef: Any, state: Any, index: jax.Array) -> Any:
    layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))
    for _, projection in list(nnx.iter_graph(layer)):
        if isinstance(projection, Projection) and not isinstance(projection, ExpertProjection):
            projection.kernel = nnx.Param(Turned.of(projection.kernel.get_value()))
    return nnx.split(layer)
