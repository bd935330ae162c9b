"""VeRA: `y = x W + ((x A) ⊙ d) B ⊙ b` (Kopiczko et al., 2023, arXiv 2310.11454, equation 2).

A and B are random, frozen and the same for all layers; only the vectors d (0.1 at the start) and b (0) are trained, so
a fresh adapter changes nothing. Every matrix takes the first rows of one A and the first columns of one B, drawn from
`projection_prng_key`: the numbers depend on their place alone, so none has to know the largest layer. A is uniform in
±√(6/in), B in ±√(6/rank).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.adapter import Adapter
from mora_jax.adapters.config import VeRAConfig
from mora_jax.adapters.dense import trained_dot
from mora_jax.adapters.variables import AdapterParam, AdapterState

Array = jax.Array


def projections(in_features: int, out_features: int, rank: int, seed: int) -> tuple[Array, Array]:
    """The frozen factors, float32 `(A [in, rank], B [rank, out])`."""
    left, right = jax.random.split(jax.random.key(seed))
    vera_a = jax.random.uniform(left, (in_features, rank), jnp.float32, -1.0, 1.0) * math.sqrt(6.0 / in_features)
    vera_b = jax.random.uniform(right, (out_features, rank), jnp.float32, -1.0, 1.0) * math.sqrt(6.0 / rank)
    return vera_a, vera_b.T


class VeRA(Adapter):
    """Two trained vectors, `vera_d [*layers, rank]` and `vera_b_scale [*layers, out]`, around frozen factors."""

    method: ClassVar[str] = "vera"

    def __init__(
        self, in_features: int, out_features: int, config: VeRAConfig, *, rngs: nnx.Rngs | None = None, **placing: Any
    ):
        super().__init__(in_features, out_features, config, **placing)
        vera_a, vera_b = projections(in_features, out_features, config.rank, config.projection_prng_key)
        self.vera_a = AdapterState(self._stack(vera_a), axes=self.stacked(self.axes[0], "rank"))
        self.vera_b = AdapterState(self._stack(vera_b), axes=self.stacked("rank", self.axes[1]))
        self.vera_d = AdapterParam(
            jnp.full((*self.layers, config.rank), config.d_initial, jnp.float32), axes=self.stacked("rank")
        )
        zeros = jnp.zeros((*self.layers, out_features), jnp.float32)
        self.vera_b_scale = AdapterParam(zeros, axes=self.stacked(self.axes[1]))

    def _stack(self, array: Array) -> Array:
        return jnp.tile(array, (*self.layers, 1, 1)) if self.layers else array

    @staticmethod
    def delta(config: VeRAConfig, out_features: int, x: Array, params: dict[str, Array]) -> Array:
        hidden = (trained_dot(x, params["vera_a"]) * params["vera_d"]).astype(x.dtype)
        return trained_dot(hidden, params["vera_b"]) * (params["vera_b_scale"] * params["scaling"])

    @staticmethod
    def dense(config: VeRAConfig, in_features: int, out_features: int, params: dict[str, Array]) -> Array:
        left = params["vera_a"] * params["vera_d"]
        product = jnp.matmul(left, params["vera_b"], precision=jax.lax.Precision.HIGHEST)
        return product * (params["vera_b_scale"] * params["scaling"])
