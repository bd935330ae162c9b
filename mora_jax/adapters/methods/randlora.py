"""RandLoRA: updates of full rank from random bases (Albert et al., 2025, arXiv 2502.00987).

`ΔW = s · Σ_j B_j Λ_j A Γ_j`: one A and n products of rank r, enough for the rank of W. A and all B_j are random, frozen
and the same for all layers; only the diagonals Λ and Γ are trained. Λ starts at zero, so a fresh adapter changes
nothing. A is on the smaller side of W, the B_j on the larger one, see `shared_bases.py`.

PEFT pairs the columns of `[B_1 … B_n]` with the rows of A, scaled and stacked, in two orders: the columns base by base,
the rows rank by rank. That is its function and that of its files, so it is the one here.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax.adapters.base import AdapterState, Params
from mora_jax.adapters.config.common import Targets
from mora_jax.adapters.methods.shared_bases import SharedBases, SharedBasesConfig, torch_generator, uniform, unit_draws
from mora_jax.adapters.products.matmul import Dot, dot

BASES = ("dense", "sparse", "very_sparse")


@dataclass(frozen=True)
class RandLoRAConfig(SharedBasesConfig):
    """RandLoRA (Albert et al., 2025, arXiv 2502.00987): trained diagonals around random bases that layers share.

    `ΔW = s · Σ_j B_j Λ_j A Γ_j` with random A and B_j.

    The other attributes are those of `SharedBasesConfig`.

    Attributes:
        rank: of each base; the smaller it is, the more bases and trained numbers there are.
        alpha: numerator of the scaling alpha / rank.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        bases: how the bases are drawn: `"dense"`, or of -1, 0 and 1, as `"sparse"` (a sixth each of -1 and 1) or
            `"very_sparse"` (1 / 2√d each, d the smaller of `widths`).

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.RandLoRAConfig(rank=2), rngs=1).trainable  # Λ [2, 2] and Γ [2, 4]
        12
    """

    rank: int = 32
    alpha: float = 640.0
    dropout: float = 0.0
    targets: Targets = "all-linear"
    bases: str = field(default="dense", kw_only=True, metadata={"choices": BASES})


@functools.lru_cache(maxsize=2)
def random_bases(rank: int, widths: tuple[int, int], seed: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The bases for the widest layers, float32 `(A [rank, smaller], B [larger, n, rank])`, read-only.

    PEFT draws A first, then B; each is divided by its standard deviation. Dense ones are drawn and kept in bfloat16,
    base by base.

    Args:
        rank: of each base.
        widths: inputs and outputs.
        seed: PEFT's `projection_prng_key`.
        kind: one of `BASES`.
    """
    smaller, larger = sorted(widths)
    count = -(-smaller // rank)
    generator = torch_generator(seed)
    if kind == "dense":
        a = uniform(generator, (rank, smaller), 1.0 / math.sqrt(smaller), jnp.bfloat16)
        bound = 1.0 / math.sqrt(rank)
        b = np.stack([uniform(generator, (larger, rank), bound, jnp.bfloat16) for _ in range(count)], axis=1)
    else:
        share = 1.0 / (2.0 * (3.0 if kind == "sparse" else math.sqrt(smaller)))
        a, b = (_signs(generator, shape, share) for shape in ((rank, smaller), (larger, count, rank)))
    bases = tuple(_normalised(base) for base in (a, b))
    for base in bases:
        base.flags.writeable = False
    return bases[0], bases[1]


def _signs(generator: np.random.RandomState, shape: tuple[int, ...], share: float) -> np.ndarray:
    draws = unit_draws(generator, shape).astype(np.float32)
    return (draws > np.float32(1.0 - share)).astype(np.float32) - (draws < np.float32(share))


def _normalised(base: np.ndarray) -> np.ndarray:
    deviation = np.std(base.astype(np.float64), ddof=1).astype(base.dtype)
    return (base.astype(np.float32) / deviation.astype(np.float32)).astype(base.dtype).astype(np.float32)


class RandLoRA(SharedBases):
    """`randlora_lambda [*layers, rank, n]` and `randlora_gamma [*layers, n, smaller side]` around frozen bases.

    n is the smaller side over the rank, rounded up.
    """

    method: ClassVar[str] = "randlora"
    config: RandLoRAConfig

    def __init__(self, in_features: int, out_features: int, config: RandLoRAConfig, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        widths = config.widths or (in_features, out_features)
        a, b = random_bases(config.rank, widths, config.projection_prng_key, config.bases)
        smaller, larger = sorted((in_features, out_features))
        on_smaller, on_larger = self.axes if in_features <= out_features else self.axes[::-1]
        count = -(-smaller // config.rank)
        self.randlora_a = AdapterState(self._stack(a[:, :smaller]), axes=self.stacked("rank", on_smaller))
        self.randlora_b = AdapterState(self._stack(b[:larger, :count]), axes=self.stacked(on_larger, "rank", "rank"))
        self.randlora_lambda = self.filled(0.0, (config.rank, count), "rank", "rank")
        self.randlora_gamma = self.filled(1.0 / max(count, smaller), (count, smaller), "rank", on_smaller)

    @classmethod
    def scale(cls, config: RandLoRAConfig) -> float:
        return config.alpha / config.rank

    @classmethod
    def factors(cls, in_features: int, params: Params) -> tuple[Array, Array]:
        """`[in, q]` and `[q, out]`, whose product times the scaling is the update; q is n times the rank."""
        a, b = params["randlora_a"], params["randlora_b"]
        scaled = params["randlora_lambda"][:, :, None] * a[:, None, :] * params["randlora_gamma"]
        rows, columns = scaled.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)
        return (rows.T, columns.T) if a.shape[-1] == in_features else (columns, rows)

    @classmethod
    def delta(cls, config: RandLoRAConfig, out_features: int, x: Array, params: Params, product: Dot = dot) -> Array:
        left, right = cls.factors(x.shape[-1], params)
        return product(product(x, left).astype(x.dtype), right) * params["scaling"]

    @classmethod
    def dense(cls, config: RandLoRAConfig, in_features: int, out_features: int, params: Params) -> Array:
        left, right = cls.factors(in_features, params)
        return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST) * params["scaling"]
