"""What every adapter method has in common: sizes, arrays, and the two ways to use them (as a path, as a weight)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.dense import Delta
from mora_jax.adapters.variables import AdapterState

Array = jax.Array


def positive(**sizes: int) -> None:
    """Raises `ValueError` with the name and the number of the first size that is no positive integer."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} must be a positive integer, not {size!r}")


@dataclass(frozen=True)
class Layout:
    """How named matrices share one output: `sizes` along `part_axis` of `out_shape`, in order."""

    out_shape: tuple[int, ...]
    part_axis: int
    sizes: tuple[int, ...]

    @property
    def features(self) -> int:
        return int(np.prod(self.out_shape))

    def part_shape(self, index: int) -> tuple[int, ...]:
        shape = list(self.out_shape)
        shape[self.part_axis] = self.sizes[index]
        return tuple(shape)

    def part_features(self, index: int) -> int:
        return int(np.prod(self.part_shape(index)))

    def take(self, y: Array, index: int) -> Array:
        """`y [..., *out_shape]` → one part, `[..., features of the part]`, in the order of its own matrix."""
        start = sum(self.sizes[:index])
        leading = y.ndim - len(self.out_shape)
        part = jax.lax.slice_in_dim(y, start, start + self.sizes[index], axis=leading + self.part_axis)
        return part.reshape(*y.shape[:leading], -1)

    def join(self, parts: list[Array]) -> Array:
        """The inverse of `take` over all parts: `[..., features of part i]` each → `[..., features]`, flat."""
        leading = parts[0].shape[:-1]
        shaped = [part.reshape(*leading, *self.part_shape(i)) for i, part in enumerate(parts)]
        if len(shaped) == 1:
            return parts[0]
        return jnp.concatenate(shaped, axis=len(leading) + self.part_axis).reshape(*leading, self.features)


class Adapter(nnx.Module):
    """The arrays of one adapter on one matrix, or on a stack of matrices when they carry a leading layer axis.

    A method is a subclass that creates its `AdapterParam`s in `__init__` and says in `delta` and `dense` what they do;
    both are pure functions of a dictionary of arrays without layer axis.

    Attributes:
        in_features, out_features: sizes of the matrix that is adapted.
        config: the method's frozen configuration.
        on_embeddings: whether the method has a form for embedding tables; it then has a `for_embedding` constructor.
        layers: `()`, or `(L,)` for a stack.
        scaling: float32 `[*layers]`; 0 for layers of a stack that are not adapted.
    """

    method: ClassVar[str]
    on_embeddings: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int, config: Any, *, num_layers=None, layer_mask=None):
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self.layers = () if num_layers is None else (num_layers,)
        scaling = jnp.full(self.layers, self.scale(config), jnp.float32)
        if layer_mask is not None:
            scaling = jnp.where(jnp.asarray(layer_mask), scaling, 0.0)
        self.scaling = AdapterState(scaling, axes=("layers",) * len(self.layers))

    @staticmethod
    def scale(config: Any) -> float:
        """The factor on the update."""
        return 1.0

    @staticmethod
    def delta(config: Any, out_features: int, x: Array, params: dict[str, Array]) -> Array:
        """`x [N, in]` → the update, float32 `[N, out]`; products in the dtype of `x`, sums in float32."""
        raise NotImplementedError  # abstract: each method's file defines it

    @staticmethod
    def dense(config: Any, in_features: int, out_features: int, params: dict[str, Array]) -> Array:
        """The update as a float32 kernel `[in, out]`."""
        raise NotImplementedError  # abstract: each method's file defines it

    @classmethod
    def fuse(cls, layout: Layout, configs: tuple[Any | None, ...]) -> Delta | None:
        """A faster joint form for several matrices with one input, or None; `configs[i]` is None for a bare part."""
        return None

    def params(self) -> dict[str, Array]:
        """The arrays by name, `scaling` among them."""
        return {name: value.get_value() for name, value in vars(self).items() if isinstance(value, nnx.Variable)}

    def delta_weight(self) -> Array:
        """The update as float32 kernels `[*layers, in, out]`."""

        def one(params):
            return self.dense(self.config, self.in_features, self.out_features, params)

        return jax.lax.map(one, self.params()) if self.scaling[...].ndim else one(self.params())


@dataclass(frozen=True)
class PartwiseDelta:
    """The general form of a joint update: each part on its own, then joined. Backward by autodiff of the parts."""

    layout: Layout
    methods: tuple[type[Adapter] | None, ...]
    configs: tuple[Any | None, ...]

    def update(self, x: Array, params: tuple[dict[str, Array] | None, ...]) -> Array:
        """`x [N, in]` → float32 `[N, features]`."""
        parts = []
        for i, (method, config) in enumerate(zip(self.methods, self.configs, strict=True)):
            features = self.layout.part_features(i)
            arrays = params[i]
            if method is None or arrays is None:
                parts.append(jnp.zeros((x.shape[0], features), jnp.float32))
            else:
                parts.append(method.delta(config, features, x, arrays))
        return self.layout.join(parts)

    def forward(self, x: Array, params: Any) -> tuple[Array, Any]:
        return jax.vjp(self.update, x, params)

    def backward(self, residuals: Any, dy: Array) -> tuple[Array, Any]:
        dx, dparams = residuals(dy.astype(jnp.float32))
        return dx.astype(jnp.float32), dparams
