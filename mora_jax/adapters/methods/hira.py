"""HiRA: `y = x (W + W ⊙ (A B)) + b` (Huang et al., ICLR 2025, openreview.net/forum?id=TwJrTz9cRS).

The product of two thin factors multiplies the kernel entry by entry, so the change has a high rank. As in PEFT there is
no scaling. A starts as LoRA's, B at zero, so a fresh adapter changes nothing.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mora_jax.adapters.base import Adapter, AdapterParam, Params
from mora_jax.adapters.config.common import CommonConfig, Targets
from mora_jax.adapters.methods import lora
from mora_jax.adapters.products.matmul import widened


@dataclass(frozen=True)
class HiRAConfig(CommonConfig):
    """HiRA (Huang et al., ICLR 2025): the kernel times one plus a product of two thin factors, entry by entry.

    `ΔW = W ⊙ (A B)`.

    Attributes:
        rank: inner size of the factors.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.HiRAConfig(rank=2), rngs=1).trainable  # A [6, 2] and B [2, 4]
        20
    """

    rank: int = 32
    dropout: float = 0.0
    targets: Targets = "all-linear"
    grows_with_rank = True

    def highest_rank(self, in_features: int, out_features: int) -> int:
        return min(in_features, out_features)


class HiRA(Adapter):
    """The factors `hira_a [*layers, in, rank]` and `hira_b [*layers, rank, out]`."""

    method: ClassVar[str] = "hira"
    additive: ClassVar[bool] = False
    transforms_kernel: ClassVar[bool] = True

    def __init__(self, in_features: int, out_features: int, config: HiRAConfig, *, rngs: nnx.Rngs, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        hira_a, hira_b = lora.init(rngs.params(), in_features, out_features, config.rank, layers=self.layers)
        self.hira_a = AdapterParam(hira_a, axes=self.stacked(self.axes[0], "rank"))
        self.hira_b = AdapterParam(hira_b, axes=self.stacked("rank", self.axes[1]))

    @classmethod
    def transform_kernel(cls, config: HiRAConfig, params: Params, kernel: Array) -> Array:
        product = jnp.matmul(params["hira_a"], params["hira_b"])
        return widened(kernel) * (1.0 + product * params["scaling"])
