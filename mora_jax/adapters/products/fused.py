"""Several matrices with one input as one product: how they share its output, and their updates side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.adapters.products.matmul import wide, widened

Array = jax.Array


@dataclass(frozen=True)
class FusedLayout:
    """How named matrices share one output: `sizes` along `part_axis` of `out_shape`, in order.

    Attributes:
        out_shape: axes of the output.
        part_axis: which of them the matrices share.
        sizes: of each along it.
        sharded: whether devices share the features of the input or of the output.
    """

    out_shape: tuple[int, ...]
    part_axis: int
    sizes: tuple[int, ...]
    sharded: bool = False

    @property
    def features(self) -> int:
        """Outputs of all parts together."""
        return int(np.prod(self.out_shape))

    def part_shape(self, index: int) -> tuple[int, ...]:
        """Shape of the output of one part."""
        shape = list(self.out_shape)
        shape[self.part_axis] = self.sizes[index]
        return tuple(shape)

    def part_features(self, index: int) -> int:
        """Outputs of one part."""
        return int(np.prod(self.part_shape(index)))

    def take(self, y: Array, index: int) -> Array:
        """`y [..., *out_shape]` → one part, `[..., features of the part]`, in the order of its own matrix."""
        start = sum(self.sizes[:index])
        leading = y.ndim - len(self.out_shape)
        part = jax.lax.slice_in_dim(y, start, start + self.sizes[index], axis=leading + self.part_axis)
        return part.reshape(*y.shape[:leading], self.part_features(index))

    def take_flat(self, y: Array, index: int) -> Array:
        """`take` of `y [..., features]`."""
        if self.part_axis:
            return self.take(y.reshape(*y.shape[:-1], *self.out_shape), index)
        start = sum(map(self.part_features, range(index)))
        return y[..., start : start + self.part_features(index)]  # with no axis split, see `join`

    def join(self, parts: list[Array]) -> Array:
        """The inverse of `take` over all parts: `[..., features of part i]` each → `[..., features]`, flat."""
        leading = parts[0].shape[:-1]
        if len(parts) == 1:
            return parts[0]
        if self.part_axis == 0:  # an axis between would move every number on TPUs
            return jnp.concatenate(parts, axis=-1)
        shaped = [part.reshape(*leading, *self.part_shape(i)) for i, part in enumerate(parts)]
        return jnp.concatenate(shaped, axis=len(leading) + self.part_axis).reshape(*leading, self.features)


@dataclass(frozen=True)
class PartwiseDelta:
    """The general form of a joint update: each part on its own, then joined. Backward by autodiff of the parts."""

    layout: FusedLayout
    methods: tuple[Any | None, ...]  # subclasses of Adapter
    configs: tuple[Any | None, ...]

    def update(self, x: Array, params: tuple[dict[str, Array] | None, ...]) -> Array:
        """`x [N, in]` → float32 `[N, features]`."""
        parts = []
        for i, (method, config) in enumerate(zip(self.methods, self.configs, strict=True)):
            features = self.layout.part_features(i)
            arrays = params[i]
            if method is None or arrays is None:
                parts.append(jnp.zeros((x.shape[0], features), wide(x.dtype)))
            else:
                parts.append(method.delta(config, features, x, arrays).astype(wide(x.dtype)))
        return self.layout.join(parts)

    def forward(self, x: Array, params: Any) -> tuple[Array, Any]:
        """As `Delta.forward`; the residuals are the linearised update."""
        tree: Any
        leaves, tree = jax.tree.flatten(params)
        changing = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

        def update(x: Array, floats: list[Array]) -> Array:
            values = iter(floats)
            merged = [next(values) if change else leaf for change, leaf in zip(changing, leaves, strict=True)]
            return self.update(x, tree.unflatten(merged))

        floats = [leaf for change, leaf in zip(changing, leaves, strict=True) if change]
        y, tangent = jax.linearize(update, x, floats)
        return y, (tangent, _Types(tree, tuple(changing), jax.typeof(x), tuple(jax.typeof(leaf) for leaf in floats)))

    def moved(self, dparams: Any) -> Any:
        """As `Delta.moved`: all of them."""
        return dparams

    def tangent(self, residuals: Any, dx: Array | None, dparams: Any) -> Array | None:
        """As `Delta.tangent`."""
        tangent, types = residuals
        changes = types.tree.flatten_up_to(dparams)
        if dx is None and all(change is None for change in changes):
            return None
        floats = [leaf for change, leaf in zip(types.changing, changes, strict=True) if change]
        filled = [_or_zeros(leaf, like) for leaf, like in zip(floats, types.floats, strict=True)]
        return tangent(_or_zeros(dx, types.x), filled)

    def backward(self, residuals: Any, dy: Array) -> tuple[Array, Any]:
        """As `Delta.backward`."""
        tangent, types = residuals
        dx, floats = jax.linear_transpose(tangent, types.x, list(types.floats))(widened(dy))
        found = iter(floats)
        return widened(dx), types.tree.unflatten([next(found) if c else None for c in types.changing])


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Types:
    """What a tangent takes: the tree of the parameters, which of them change (integers don't), and the types."""

    tree: Any
    changing: tuple[bool, ...]
    x: Any
    floats: tuple[Any, ...]


def _or_zeros(change: Array | None, like: Any) -> Array:
    return jnp.zeros(like.shape, like.dtype) if change is None else change
