"""Experts beside a dense MLP, each with norms before and behind it, as Gemma 4 has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax import Array

from mora_jax.adapters.projection import TokenDropout
from mora_jax.models.block import MLP, dropout_at, stacked_norm
from mora_jax.models.config import DecoderConfig
from mora_jax.models.experts import Experts


class ExpertsBeside(nnx.Module):
    """`norm(MLP(norm(x))) + norm(experts(norm(x)))`, in the place of the MLP. No norm is before all of it, since
    the router reads `x` itself."""

    def __init__(self, config: DecoderConfig, activation: Callable[[Array], Array], **making: Any):
        """Makes both; `activation` is that of the experts' gate."""
        assert config.experts is not None
        self.dense = MLP(config, **making)
        self.experts = Experts(config, activation, **making)  # with the norm before them
        before, behind, _, behind_experts = config.experts.norms
        self.dense_norm = stacked_norm(config, before)
        self.post_dense_norm = stacked_norm(config, behind)
        self.post_experts_norm = stacked_norm(config, behind_experts)

    def __call__(self, x: Array, layout: Any, token_dropout: TokenDropout | None) -> Array:
        """`x [B, T, D]` to `[B, T, D]`, with the `RowLayout` of the block."""
        dense = self.post_dense_norm(self.dense(self.dense_norm(x), layout, token_dropout))
        return dense + self.post_experts_norm(self.experts(x, layout, dropout_at(token_dropout, 6)))

    def use(self, x: Array, segments: Array) -> tuple[Array, Array]:
        """See `Experts.use`."""
        return self.experts.use(x, segments)
