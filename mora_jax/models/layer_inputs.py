"""Inputs that every layer has for itself, beside the residual stream, as Gemma 4 has them (of Gemma 3n)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.projection import Part, Projection
from mora_jax.models.block import ACTIVATIONS, dropout_at, norm_of, stacked_matrix, stacked_norm
from mora_jax.models.decoder import TokenEmbedding, looked_up
from mora_jax.models.layer_scan import checkpointed

if TYPE_CHECKING:
    from mora_jax.adapters.projection import TokenDropout
    from mora_jax.models.block import RowLayout
    from mora_jax.models.config import DecoderConfig
    from mora_jax.models.partitioning import Partitioner


class LayerInputs(nnx.Module):
    """`(norm(x W / √D) + √P · table[id]) / √2` for all layers, P numbers of a token for each.

    Attributes:
        table: a `TokenEmbedding` `[V, L · P]`.
        projection: from the embedding of a token `[D]` to `[L · P]`.
        norm: over the numbers of a layer.
    """

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs | None):
        """Draws the parameters from `rngs`, or leaves zeros for a loader to fill."""
        assert config.layer_input is not None
        names, self.width = config.names, config.layer_input.width
        size = config.num_layers * self.width
        self.table = TokenEmbedding(
            config.vocab_size,
            size,
            path=names.layer_embedding,
            scale=config.initializer_range,
            dtype=dtype,
            rngs=rngs,
        )
        path, _, name = names.layer_inputs.rpartition(".")
        self.projection = Projection(
            (Part(name, size),),
            config.hidden_size,
            out_shape=(size,),
            axes=("embed", "layer_inputs"),
            path=f"{path}.{{name}}",
            dtype=dtype,
            rngs=rngs,
            init_std=config.initializer_range,
        )
        self.norm = norm_of(config, names.layer_inputs_norm, size=self.width, axis="layer_inputs")

    def __call__(
        self,
        ids: jax.Array,
        x: jax.Array,
        token_dropout: TokenDropout | None = None,
        partitioner: Partitioner | None = None,
    ) -> jax.Array:
        """`[B, T, L, P]` for `ids [B, T]` and their embeddings `x [B, T, D]`, as they go into the first layer."""
        shape = (*ids.shape, -1, self.width)
        projected = self.projection(x, token_dropout=token_dropout) * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
        rows = looked_up(self.table, ids, partitioner) * jnp.asarray(self.width**0.5, x.dtype)
        return (self.norm(projected.reshape(shape)) + rows.reshape(shape)) * jnp.asarray(2**-0.5, x.dtype)


class LayerInput(nnx.Module):
    """What all layers do with their inputs: `norm(W (activation(gate x) · input))`, added to the residual stream."""

    def __init__(self, config: DecoderConfig, **making: Any):
        """Makes the stacked projections; `making` is the dtype, the keys and the quantisation of `Projection`."""
        assert config.layer_input is not None
        names, width, hidden = config.names, config.layer_input.width, config.hidden_size
        axes = ("embed", "layer_inputs")
        self.gate_proj = stacked_matrix(config, names.input_gate, (hidden, width), axes, **making)
        self.out_proj = stacked_matrix(config, names.input_out, (width, hidden), axes[::-1], **making)
        self.norm = stacked_norm(config, names.input_norm)
        self.activation = config.activation

    def __call__(self, x: jax.Array, layout: RowLayout, token_dropout: TokenDropout | None) -> jax.Array:
        """What is added to `x [B, T, D]`."""
        assert layout.layer_input is not None
        gate = checkpointed(layout.project(self.gate_proj, x, dropout_at(token_dropout, 4)))
        inner = ACTIVATIONS[self.activation](gate.astype(jnp.float32)) * layout.layer_input.astype(jnp.float32)
        out = layout.project(self.out_proj, inner.astype(x.dtype), dropout_at(token_dropout, 5))
        return self.norm(checkpointed(out))
