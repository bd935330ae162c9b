"""VeRA: `y = x W + ((x A) ⊙ d) B ⊙ b` (Kopiczko et al., 2023, arXiv 2310.11454, equation 2).

A and B are random, frozen and the same for all layers; only the vectors d (0.1 at the start) and b (0) are trained, so
a fresh adapter changes nothing. Every matrix takes the first rows of one A and the first columns of one B, which are as
large as the largest adapted layer (`config.widths`) and drawn from `projection_prng_key` as PEFT draws them: A uniform
in ±√(6/in), B in ±√(6/rank).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.base import Adapter, AdapterParam, AdapterState
from mora_jax.adapters.config.common import BIASES, CommonConfig, Targets
from mora_jax.adapters.config.limits import POSITIVE
from mora_jax.adapters.products.matmul import trained_dot

Array = jax.Array


@dataclass(frozen=True)
class VeRAConfig(CommonConfig):
    """VeRA (Kopiczko et al., 2023, arXiv 2310.11454): two trained vectors around random factors that layers share.

    Attributes:
        rank: inner size of the frozen factors; far higher than LoRA's.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        d_initial: what the inner vector starts from.
        projection_prng_key: seed of the frozen factors, which are PEFT's for the same seed, rank and widths.
        widths: inputs and outputs of the frozen factors, of which every layer takes its first ones; None for those of
            the largest layers that `attach` adapts.
        bias: which existing biases are trained too, as in `LoRAConfig`.
    """

    rank: int = 256
    dropout: float = 0.0
    targets: Targets = "all-linear"
    d_initial: float = field(default=0.1, kw_only=True)
    projection_prng_key: int = field(default=0, kw_only=True)
    widths: tuple[int, int] | None = field(default=None, kw_only=True)
    bias: str = field(default="none", kw_only=True, metadata={"choices": BIASES})
    implied = ("widths",)

    @property
    def linen_refusal(self) -> str:
        if self.widths is not None:
            return ""
        return "VeRA's frozen factors serve all layers: give widths=(largest inputs, largest outputs)"

    def __post_init__(self):
        super().__post_init__()
        if self.widths is not None:
            if not isinstance(self.widths, tuple | list) or len(self.widths) != 2:
                raise ValueError(f"widths must be a number of inputs and one of outputs, not {self.widths!r}")
            inputs, outputs = (POSITIVE.check(width, f"widths[{i}]") for i, width in enumerate(self.widths))
            object.__setattr__(self, "widths", (inputs, outputs))


def projections(rank: int, widths: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The frozen factors of the widest layers, float32 `(A [in, rank], B [rank, out])`.

    The numbers are those that PEFT draws with torch's generator on the CPU: Mersenne Twister seeded with `seed`, the
    low 24 bits of each draw, first A row by row, then B.

    Args:
        rank: inner size.
        widths: inputs and outputs.
        seed: PEFT's `projection_prng_key`.
    """
    inputs, outputs = widths
    # Legacy seeding is torch's, and numpy promises to keep its numbers.
    generator = np.random.RandomState(seed % 2**32)
    vera_a = _uniform(generator, (rank, inputs), math.sqrt(6.0 / inputs))
    vera_b = _uniform(generator, (outputs, rank), math.sqrt(6.0 / rank))
    return vera_a.T, vera_b.T


def _uniform(generator: np.random.RandomState, shape: tuple[int, int], bound: float) -> np.ndarray:
    draws = np.frombuffer(generator.bytes(4 * shape[0] * shape[1]), "<u4")
    unit = (draws & 0xFFFFFF) / 2.0**24
    edge = np.float32(bound)
    return (unit * np.float64(edge + edge) - np.float64(edge)).astype(np.float32).reshape(shape)


class VeRA(Adapter):
    """Two trained vectors, `vera_d [*layers, rank]` and `vera_b_scale [*layers, out]`, around frozen factors."""

    method: ClassVar[str] = "vera"
    vectors: ClassVar[frozenset[str]] = Adapter.vectors | {"vera_d", "vera_b_scale"}

    def __init__(
        self, in_features: int, out_features: int, config: VeRAConfig, *, rngs: nnx.Rngs | None = None, **placing: Any
    ):
        super().__init__(in_features, out_features, config, **placing)
        vera_a, vera_b = projections(
            config.rank, config.widths or (in_features, out_features), config.projection_prng_key
        )
        self.vera_a = AdapterState(self._stack(vera_a[:in_features]), axes=self.stacked(self.axes[0], "rank"))
        self.vera_b = AdapterState(self._stack(vera_b[:, :out_features]), axes=self.stacked("rank", self.axes[1]))
        self.vera_d = AdapterParam(
            jnp.full((*self.layers, config.rank), config.d_initial, jnp.float32), axes=self.stacked("rank")
        )
        zeros = jnp.zeros((*self.layers, out_features), jnp.float32)
        self.vera_b_scale = AdapterParam(zeros, axes=self.stacked(self.axes[1]))

    @classmethod
    def configure_for_shapes(cls, config: VeRAConfig, sizes: Iterable[tuple[int, int]]) -> VeRAConfig:
        if config.widths is not None:
            return config
        inputs, outputs = zip(*sizes, strict=True)
        return replace(config, widths=(max(inputs), max(outputs)))

    def _stack(self, array: np.ndarray) -> Array:
        return jnp.asarray(np.broadcast_to(array, (*self.layers, *array.shape)))

    @classmethod
    def delta(cls, config: VeRAConfig, out_features: int, x: Array, params: dict[str, Array]) -> Array:
        hidden = (trained_dot(x, params["vera_a"]) * params["vera_d"]).astype(x.dtype)
        return trained_dot(hidden, params["vera_b"]) * (params["vera_b_scale"] * params["scaling"])

    @classmethod
    def dense(cls, config: VeRAConfig, in_features: int, out_features: int, params: dict[str, Array]) -> Array:
        left = params["vera_a"] * params["vera_d"]
        product = jnp.matmul(left, params["vera_b"], precision=jax.lax.Precision.HIGHEST)
        return product * (params["vera_b_scale"] * params["scaling"])

    @classmethod
    def low_rank(
        cls, config: VeRAConfig, in_features: int, out_features: int, params: dict[str, Any]
    ) -> tuple[Any, Any]:
        return params["vera_a"] * params["vera_d"], params["vera_b"] * params["vera_b_scale"]
