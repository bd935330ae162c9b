"""MiSS: one small matrix that all shards of the inputs share (Kang and Yin, 2024, arXiv 2409.15371).

The inputs are cut into shards of r features, the last one filled with zeros. `y = x W + (Σ_s x_s) D`: the shards are
summed and go through one D `[r, out]`, so the update's kernel is D again and again, `ΔW[i, o] = D[i mod r, o]`. Of form
`mini` the outputs share too: D is `[r, m]`, and `ΔW[i, o] = D[i mod r, o mod m]`. D starts at zero, so a fresh adapter
changes nothing. Names and layout are PEFT's.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax.adapters.base import Adapter, Params
from mora_jax.adapters.config.common import BIASES, CommonConfig, Targets
from mora_jax.adapters.config.limits import POSITIVE
from mora_jax.adapters.products.matmul import Dot, dot, widened

FORMS = ("standard", "mini")


@dataclass(frozen=True)
class MiSSConfig(CommonConfig):
    """MiSS (Kang and Yin, 2024, arXiv 2409.15371): shards of the inputs share one small matrix.

    `ΔW[i, o] = D[i mod rank, o]` with D `[rank, out]`.

    Attributes:
        rank: size of a shard, at most the inputs of the smallest layer.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        form: what shares the matrix: `"standard"`, shards of the inputs, or `"mini"`, those of the outputs too.
        mini_rank: size of a shard of the outputs in form `mini`; it divides the outputs of every layer.
        bias: which existing biases are trained too, as in `LoRAConfig`.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.MiSSConfig(rank=2), rngs=1).trainable  # D [2, 4]
        8
    """

    rank: int = 64
    dropout: float = 0.0
    targets: Targets = "all-linear"
    form: str = field(default="standard", kw_only=True, metadata={"choices": FORMS})
    mini_rank: int = field(default=1, kw_only=True, metadata={"limits": POSITIVE})
    bias: str = field(default="none", kw_only=True, metadata={"choices": BIASES})


class MiSS(Adapter):
    """The shared matrix, `miss_block [*layers, rank, out]`, or `[*layers, rank, mini_rank]` of form `mini`."""

    method: ClassVar[str] = "miss"
    config: MiSSConfig

    def __init__(self, in_features: int, out_features: int, config: MiSSConfig, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        if config.rank > in_features:
            raise ValueError(f"rank is {config.rank}, but a shard of MiSS has at most the layer's {in_features} inputs")
        mini = config.form == "mini"
        if mini and out_features % config.mini_rank:
            raise ValueError(
                f"mini_rank is {config.mini_rank}, which does not divide the layer's {out_features} outputs"
            )
        columns, axis = (config.mini_rank, "rank") if mini else (out_features, self.axes[1])
        self.miss_block = self.filled(0.0, (config.rank, columns), "rank", axis)

    @classmethod
    def delta(cls, config: MiSSConfig, out_features: int, x: Array, params: Params, product: Dot = dot) -> Array:
        shards = -(-x.shape[-1] // config.rank)
        padded = jnp.pad(widened(x), ((0, 0), (0, shards * config.rank - x.shape[-1])))
        summed = jnp.sum(padded.reshape(len(x), shards, config.rank), axis=1)
        y = product(summed.astype(x.dtype), params["miss_block"]) * params["scaling"]
        return jnp.tile(y, (1, out_features // y.shape[-1]))

    @classmethod
    def dense(cls, config: MiSSConfig, in_features: int, out_features: int, params: Params) -> Array:
        block = params["miss_block"] * params["scaling"]
        rows = block[np.arange(in_features) % config.rank]
        return jnp.tile(rows, (1, out_features // rows.shape[-1]))

    @classmethod
    def low_rank(
        cls, config: MiSSConfig, in_features: int, out_features: int, params: dict[str, Any]
    ) -> tuple[Any, Any]:
        block = params["miss_block"]
        shards = np.eye(config.rank, dtype=np.float32)[np.arange(in_features) % config.rank]
        return shards, np.tile(block, (1, out_features // block.shape[-1]))
