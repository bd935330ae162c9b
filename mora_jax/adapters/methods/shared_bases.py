"""What VeRA and RandLoRA have in common: random frozen arrays that all layers share, drawn as PEFT draws them.

Every matrix takes the first features of arrays that are as large as the largest adapted layer (`config.widths`). The
numbers are those of torch's generator on the CPU: Mersenne Twister, of each draw the low 24 bits.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax.adapters.base import Adapter
from mora_jax.adapters.config.common import BIASES, CommonConfig
from mora_jax.adapters.config.limits import COUNT, POSITIVE


@dataclass(frozen=True, kw_only=True)
class SharedBasesConfig(CommonConfig):
    """The settings of methods whose layers share random arrays.

    Attributes:
        projection_prng_key: seed of the random arrays, which are PEFT's for the same seed, rank and widths.
        widths: inputs and outputs of the largest layer, which the random arrays are made for; None for those of the
            layers that `attach` adapts.
        bias: which existing biases are trained too, as in `LoRAConfig`.
    """

    projection_prng_key: int = field(default=0, metadata={"limits": COUNT})
    widths: tuple[int, int] | None = None
    bias: str = field(default="none", metadata={"choices": BIASES})
    derived_fields = ("widths",)

    def __post_init__(self):
        super().__post_init__()
        if self.widths is not None:
            if not isinstance(self.widths, tuple | list) or len(self.widths) != 2:
                raise ValueError(f"widths must be a number of inputs and one of outputs, not {self.widths!r}")
            inputs, outputs = (POSITIVE.check(width, f"widths[{i}]") for i, width in enumerate(self.widths))
            object.__setattr__(self, "widths", (inputs, outputs))

    @property
    def tree_refusal(self) -> str:
        if self.widths is not None:
            return ""
        name = type(self).__name__.removesuffix("Config")
        return f"{name}'s random arrays serve all layers: give widths=(largest inputs, largest outputs)"


class SharedBases(Adapter):
    """An adapter around frozen arrays that are pieces of those which all layers share."""

    @classmethod
    def configure_for_shapes(cls, config: Any, sizes: Iterable[tuple[int, int]]) -> Any:
        if config.widths is not None:
            return config
        inputs, outputs = zip(*sizes, strict=True)
        return replace(config, widths=(max(inputs), max(outputs)))

    def _stack(self, array: np.ndarray) -> Array:
        # Where only shapes are asked for, all layers' copies take no memory.
        return jnp.broadcast_to(jnp.asarray(array), (*self.layers, *array.shape))


def torch_generator(seed: int) -> np.random.RandomState:
    """A generator with the numbers of `torch.Generator().manual_seed(seed)`.

    Legacy seeding is torch's, and numpy promises to keep its numbers.
    """
    return np.random.RandomState(seed % 2**32)


def unit_draws(generator: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform in [0, 1), float64 with 24 bits."""
    draws = np.frombuffer(generator.bytes(4 * math.prod(shape)), "<u4")
    return ((draws & 0xFFFFFF) / 2.0**24).reshape(shape)


def uniform(generator: np.random.RandomState, shape: tuple[int, ...], bound: float, dtype: Any) -> np.ndarray:
    """Uniform in ±bound; what is rounded up to the bound is the other end, as in torch."""
    edge = np.float32(bound)
    values = (unit_draws(generator, shape) * np.float64(edge + edge) - np.float64(edge)).astype(dtype)
    values[values >= edge.astype(dtype)] = (-edge).astype(dtype)
    return values
