"""(IA)³: learned vectors that rescale activations (Liu et al., 2022, arXiv 2205.05638, section 3.3).

Keys and values are scaled at the output, `y = l ⊙ (x W + b)`; feed-forward layers at the input, `y = (l ⊙ x) W + b`.
l starts at one, so a fresh adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.base import Adapter, AdapterParam
from mora_jax.adapters.config import IA3Config
from mora_jax.adapters.products.matmul import widened

Array = jax.Array


class IA3(Adapter):
    """One vector `ia3_l`, `[*layers, in]` where the configuration names a feed-forward layer, else `[*layers, out]`."""

    method: ClassVar[str] = "ia3"
    additive: ClassVar[bool] = False

    def __init__(
        self, in_features: int, out_features: int, config: IA3Config, *, rngs: nnx.Rngs | None = None, **placing: Any
    ):
        super().__init__(in_features, out_features, config, **placing)
        size, axis = (in_features, self.axes[0]) if config.feedforward else (out_features, self.axes[1])
        self.ia3_l = AdapterParam(jnp.ones((*self.layers, size), jnp.float32), axes=self.stacked(axis))

    @classmethod
    def output_gain(cls, config: IA3Config, params: dict[str, Array], kernel: Callable[[], Array]) -> Array | None:
        return None if config.feedforward else _vector(params)

    @classmethod
    def input_gain(cls, config: IA3Config, params: dict[str, Array]) -> Array | None:
        return _vector(params) if config.feedforward and params else None

    @classmethod
    def added_bias(cls, config: IA3Config, params: dict[str, Array], bias: Array | None) -> Array | None:
        if config.feedforward or bias is None:
            return None
        return (_vector(params) - 1.0) * widened(bias)


def _vector(params: dict[str, Array]) -> Array:
    return jnp.where(params["scaling"] != 0, params["ia3_l"], 1.0)
