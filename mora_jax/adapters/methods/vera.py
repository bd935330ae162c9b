"""VeRA: `y = x W + ((x A) ⊙ d) B ⊙ b` (Kopiczko et al., 2023, arXiv 2310.11454, section 3.1).

A and B are random, frozen and the same for all layers; only the vectors d (0.1 at the start) and b (0) are trained, so
a fresh adapter changes nothing. A is uniform in ±√(6/in), B in ±√(6/rank), see `shared_bases.py`.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jax import Array

from mora_jax.adapters.base import Adapter, AdapterState, Params
from mora_jax.adapters.config.common import Targets
from mora_jax.adapters.config.limits import Number
from mora_jax.adapters.methods.lora import delta_weight, thin_products
from mora_jax.adapters.methods.shared_bases import SharedBases, SharedBasesConfig, torch_generator, uniform
from mora_jax.adapters.products.matmul import Dot, dot


@dataclass(frozen=True)
class VeRAConfig(SharedBasesConfig):
    """VeRA (Kopiczko et al., 2023, arXiv 2310.11454): two trained vectors around random factors that layers share.

    `y = x W + ((x A) ⊙ d) B ⊙ b` with A and B drawn once for all layers.

    The other attributes are those of `SharedBasesConfig`.

    Attributes:
        rank: inner size of the frozen factors; far higher than LoRA's.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        d_initial: what the inner vector starts from.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.VeRAConfig(rank=16), rngs=1).trainable  # d [16] and b [4]
        20
    """

    rank: int = 256
    dropout: float = 0.0
    targets: Targets = "all-linear"
    d_initial: float = field(default=0.1, kw_only=True, metadata={"limits": Number()})


def projections(rank: int, widths: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The frozen factors of the widest layers, float32 `(A [in, rank], B [rank, out])`.

    PEFT draws A first, row by row, then B.

    Args:
        rank: inner size.
        widths: inputs and outputs.
        seed: PEFT's `projection_prng_key`.
    """
    inputs, outputs = widths
    generator = torch_generator(seed)
    vera_a = uniform(generator, (rank, inputs), math.sqrt(6.0 / inputs), np.float32)
    vera_b = uniform(generator, (outputs, rank), math.sqrt(6.0 / rank), np.float32)
    return vera_a.T, vera_b.T


class VeRA(SharedBases):
    """Two trained vectors, `vera_d [*layers, rank]` and `vera_b_scale [*layers, out]`, around frozen factors."""

    method: ClassVar[str] = "vera"
    by_products: ClassVar[bool] = True
    vectors: ClassVar[frozenset[str]] = Adapter.vectors | {"vera_d", "vera_b_scale"}

    def __init__(self, in_features: int, out_features: int, config: VeRAConfig, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        vera_a, vera_b = projections(
            config.rank, config.widths or (in_features, out_features), config.projection_prng_key
        )
        self.vera_a = AdapterState(self._stack(vera_a[:in_features]), axes=self.stacked(self.axes[0], "rank"))
        self.vera_b = AdapterState(self._stack(vera_b[:, :out_features]), axes=self.stacked("rank", self.axes[1]))
        self.vera_d = self.filled(config.d_initial, (config.rank,), "rank")
        self.vera_b_scale = self.filled(0.0, (out_features,), self.axes[1])

    @classmethod
    def delta(cls, config: VeRAConfig, out_features: int, x: Array, params: Params, product: Dot = dot) -> Array:
        y = thin_products(x, params["vera_a"], params["vera_b"], params["vera_d"], product)
        return y * (params["vera_b_scale"] * params["scaling"])

    @classmethod
    def dense(cls, config: VeRAConfig, in_features: int, out_features: int, params: Params) -> Array:
        product = delta_weight(params["vera_a"] * params["vera_d"], params["vera_b"])
        return product * (params["vera_b_scale"] * params["scaling"])

    @classmethod
    def low_rank(
        cls, config: VeRAConfig, in_features: int, out_features: int, params: dict[str, Any]
    ) -> tuple[Any, Any]:
        return params["vera_a"] * params["vera_d"], params["vera_b"] * params["vera_b_scale"]
