"""Layers apart from each other, as one token at a time wants them on a CPU.

XLA's CPU backend copies a layer out of a stack before it multiplies with it, which costs more than the product with one
token does. Here every layer has arrays of its own, and matrices lie as `[out, in]`, the form in which its products with
few rows read them fastest. Layers of a kind share one function, which is traced once, and where they are large compiled
once and called for each in turn: as one program SmolLM2's 30 take 38 s of CPU time to compile, and are no faster.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.expert_projection import ExpertProjection
from mora_jax.adapters.products.matmul import TransposedKernel
from mora_jax.adapters.projection import Projection
from mora_jax.adapters.slots import use
from mora_jax.models.block import LayerRunner, RowLayout, of_layer
from mora_jax.models.kv_cache import CacheSlot

if TYPE_CHECKING:
    from mora_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class UnstackedLayers:
    """A copy of the layers of a decoder.

    Attributes:
        leaves: for each layer its arrays, kernels `TransposedKernel`.
        structure: from the arrays of a layer to a `Block`.
        programs: what runs each layer.
        table: the bits of a bfloat16 embedding, uint16 `[V, D]`; None for others. XLA's CPU backend widens a whole
            bfloat16 table to look up a row.
    """

    leaves: tuple[tuple[Any, ...], ...]
    structure: Structure
    programs: tuple[Callable[..., Any], ...]
    table: jax.Array | None

    @classmethod
    def of(cls, model: Decoder) -> UnstackedLayers:
        """Copies the layers of a model whose kernels are not quantised, and what is looked up in its embedding."""
        graphdef, state = nnx.split(model.layers)
        config, runner = model.config, model.runner
        split = [_layer(graphdef, state, jnp.int32(i)) for i in range(config.num_layers)]
        structure = Structure(split[0][0], jax.tree.structure(split[0][1]))
        kinds = zip(config.windows, config.layer_ropes, strict=True)
        programs = tuple(_program(runner, structure, window, rope) for window, rope in kinds)
        table = model.embed_tokens.embedding[...]
        plain = table.dtype == jnp.bfloat16 and getattr(model.embed_tokens, "adapter", None) is None
        # Tuples, which JAX takes apart faster than states.
        leaves = tuple(tuple(jax.tree.leaves(state)) for _, state in split)
        return cls(leaves, structure, programs, _bits(table) if plain else None)


@dataclasses.dataclass(frozen=True)
class Structure:
    """From arrays to the module that they are of. Hashable.

    Attributes:
        graphdef: of the module.
        tree: of its state.
    """

    graphdef: Any
    tree: Any

    def merge(self, leaves: tuple[Any, ...]) -> Any:
        """The module on those arrays."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.tree, leaves))


# One for each kind of layer, whichever model it is of, so that nothing is compiled twice.
@functools.lru_cache(maxsize=64)
def _program(runner: LayerRunner, structure: Structure, window: int | None, rope: int) -> Callable[..., Any]:
    """A compiled layer behind the tokens of its cache, whose arrays are used up.

    It takes the leaves, `x [B, T, D]`, the layer's keys and values `[B, kv_heads, S, head_dim]`, the arrays of a
    `RowLayout` as `LayerRunner.shared` gives it, int32 `[]`, the slots that were used, and int `[B]`, which of several
    named adapters each row uses, or None for the active one. It gives `[B, T, D]`, keys and values.
    """

    @functools.partial(jax.jit, donate_argnums=(2, 3))
    def run_layer(
        leaves: Any, x: jax.Array, keys: Any, values: Any, layout: Any, length: Any, adapter_ids: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        layer = structure.merge(leaves)
        if adapter_ids is not None:
            use(layer, adapter_ids)
        rows = of_layer(RowLayout(**layout, window=None), runner.config, window, rope)
        x, slot, _ = layer(x, rows, CacheSlot(keys, values, None, length), None)
        return x, slot.keys, slot.values

    return run_layer


def looked_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of `UnstackedLayers.table`, bfloat16 `[..., D]` for `ids [...]`; NaN for an id without a row."""
    nan = jax.lax.bitcast_convert_type(jnp.bfloat16(jnp.nan), jnp.uint16)
    rows = table.at[ids].get(mode="clip", wrap_negative_indices=False)
    known = ((ids >= 0) & (ids < table.shape[0]))[..., None]
    return jax.lax.bitcast_convert_type(jnp.where(known, rows, nan), jnp.bfloat16)


@jax.jit
def _bits(table: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(table, jnp.uint16)


@functools.partial(jax.jit, static_argnums=0)
def _layer(graphdef: Any, state: Any, index: jax.Array) -> Any:
    layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))
    for _, projection in list(nnx.iter_graph(layer)):
        if isinstance(projection, Projection) and not isinstance(projection, ExpertProjection):
            projection.kernel = nnx.Param(TransposedKernel.of(projection.kernel.get_value()))
    return nnx.split(layer)
