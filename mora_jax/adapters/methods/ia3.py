"""(IA)³: learned vectors that rescale activations (Liu et al., 2022, arXiv 2205.05638, section 3.3).

Keys and values are scaled at the output, `y = l ⊙ (x W + b)`; feed-forward layers at the input, `y = (l ⊙ x) W + b`.
l starts at one, so a fresh adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from mora_jax.adapters.base import Adapter, Params
from mora_jax.adapters.config.common import CommonConfig, Targets
from mora_jax.adapters.products.matmul import widened
from mora_jax.adapters.targets import named


@dataclass(frozen=True)
class IA3Config(CommonConfig):
    """(IA)³ (Liu et al., 2022, arXiv 2205.05638): learned vectors rescale keys, values and feed-forward inputs.

    `y = l ⊙ (x W + b)`, or `y = (l ⊙ x) W + b` in feed-forward layers (section 3.3).

    Attributes:
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        feedforward: names of those layers whose inputs are scaled; outputs are scaled of the others.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.IA3Config(targets="all-linear"), rngs=1).trainable  # l [4]
        4
    """

    targets: Targets = ("k_proj", "v_proj", "down_proj")
    feedforward: tuple[str, ...] = field(default=("down_proj",), kw_only=True, metadata={"unset": "down_proj"})

    def __post_init__(self):
        super().__post_init__()
        given = self.feedforward
        names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (None,)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"feedforward must be layer names, not {given!r}")
        object.__setattr__(self, "feedforward", names)

    @classmethod
    def for_run(cls, settings: Mapping[str, Any], steps: int | None) -> IA3Config:
        config = cls(**settings)
        stray = [name for name in settings.get("feedforward", ()) if name not in config.targets]
        if stray and not isinstance(config.targets, str):
            raise ValueError(f"feedforward: {stray[0]!r} is none of targets, which are {', '.join(config.targets)}")
        return config

    def at_path(self, path: str) -> IA3Config:
        is_feedforward = any(named(path, name) for name in self.feedforward)
        return replace(self, feedforward=self.feedforward if is_feedforward else ())


class IA3(Adapter):
    """One vector `ia3_l`, `[*layers, in]` where the configuration names a feed-forward layer, else `[*layers, out]`."""

    method: ClassVar[str] = "ia3"
    vectors: ClassVar[frozenset[str]] = Adapter.vectors | {"ia3_l"}
    scales_bias: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int, config: IA3Config, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        size, axis = (in_features, self.axes[0]) if config.feedforward else (out_features, self.axes[1])
        self.ia3_l = self.filled(1.0, (size,), axis)

    @classmethod
    def output_gain(cls, config: IA3Config, params: Params, kernel: Callable[[], Array]) -> Array | None:
        return None if config.feedforward else _vector(params)

    @classmethod
    def transform_input(cls, config: IA3Config, params: Params, x: Array) -> Array | None:
        return (widened(x) * _vector(params)).astype(x.dtype) if config.feedforward else None

    @classmethod
    def added_bias(cls, config: IA3Config, params: Params, bias: Array | None) -> Array | None:
        if config.feedforward or bias is None:
            return None
        return (_vector(params) - 1.0) * widened(bias)


def _vector(params: Params) -> Array:
    return jnp.where(params["scaling"] != 0, params["ia3_l"], 1.0)
