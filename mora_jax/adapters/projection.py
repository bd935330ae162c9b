"""The decoder's slot for a frozen, perhaps adapted, matrix product: stacked by layer, several named matrices fused.

Query, key and value share one input, so they are one kernel in memory; so are gate and up. Names stay separate
outside: adapters, targets, import and export know `q_proj`, not the fusion. A stacked projection holds every layer's
kernel with a leading layer axis; the decoder scans over layers and calls it on the slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.adapter import Adapter, Layout, PartwiseDelta
from mora_jax.adapters.dense import adapted_dot

Array = jax.Array


@dataclass(frozen=True)
class Part:
    """A named matrix inside a projection: `size` entries along the projection's part axis."""

    name: str
    size: int


class Projection(nnx.Module):
    """`y = x W + b + updates`, W frozen unless full fine-tuning makes it a trained master.

    Args:
        parts: the named matrices, in the order in which they lie along `out_shape[part_axis]`.
        in_features: size of the input.
        out_shape: axes of the output; their product is the number of output features.
        part_axis: the axis of `out_shape` that the parts share.
        axes: logical names of `[in, *out_shape]`.
        num_layers: length of the stack, or None for a single projection.
        use_bias: whether there is a bias `[*out_shape]`.
        path: HuggingFace's path of a part, with `{layer}` and `{name}` to fill in.
        dtype: dtype of the stored kernel.
        rngs: keys for a random start (normal, `init_std`); None leaves zeros for a loader to fill.
        init_std: standard deviation of a random start.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        in_features: int,
        *,
        out_shape: tuple[int, ...],
        part_axis: int = 0,
        axes: tuple[str, ...],
        num_layers: int | None = None,
        use_bias: bool = False,
        path: str,
        dtype=jnp.float32,
        rngs: nnx.Rngs | None = None,
        init_std: float = 0.02,
    ):
        if sum(part.size for part in parts) != out_shape[part_axis]:
            sizes = [part.size for part in parts]
            raise ValueError(f"parts of sizes {sizes} don't fill axis {part_axis} of out_shape {out_shape}")
        self.parts = tuple(parts)
        self.in_features = in_features
        self.layout = Layout(tuple(out_shape), part_axis, tuple(part.size for part in parts))
        self.axes = tuple(axes)
        self.num_layers = num_layers
        self.path = path
        stack = () if num_layers is None else (num_layers,)
        names = ("layers",) * len(stack)
        shape = (*stack, in_features, *out_shape)
        if rngs is None:
            kernel = jnp.zeros(shape, dtype)
        else:
            kernel = (jax.random.normal(rngs.params(), shape, jnp.float32) * init_std).astype(dtype)
        self.kernel = nnx.Param(kernel, axes=(*names, *axes))
        bias = nnx.Param(jnp.zeros((*stack, *out_shape), dtype), axes=(*names, *axes[1:])) if use_bias else None
        self.bias = nnx.data(bias)
        self.adapters: Any = nnx.Dict()

    def __call__(self, x: Array, *, dropout_key: Array | None = None) -> Array:
        """`x [..., in]` → `[..., *out_shape]` in the dtype of `x`, on leaves without layer axis.

        Args:
            x: input in the compute dtype.
            dropout_key: turns the adapters' dropout on; each part draws its own mask.
        """
        flat = x.reshape(-1, self.in_features)
        # The kernel is stored in the compute dtype; a trained float32 master is cast here, inside the product.
        kernel = self.kernel.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        found = tuple(self.adapters.get(part.name) for part in self.parts)
        if all(adapter is None for adapter in found):
            y = adapted_dot(None, flat, kernel, bias, None)
            return y.reshape(*x.shape[:-1], *self.layout.out_shape)
        methods = tuple(None if a is None else type(a) for a in found)
        configs = tuple(None if a is None else a.config for a in found)
        params = tuple(None if a is None else a.params() for a in found)
        if dropout_key is not None and any(c is not None and c.dropout > 0 for c in configs):
            y = adapted_dot(None, flat, kernel, bias, None).astype(jnp.float32)
            y = (y + self._dropped(flat, methods, configs, params, dropout_key)).astype(x.dtype)
            return y.reshape(*x.shape[:-1], *self.layout.out_shape)
        kinds = {m for m in methods if m is not None}
        delta = kinds.pop().fuse(self.layout, configs) if len(kinds) == 1 else None
        y = adapted_dot(delta or PartwiseDelta(self.layout, methods, configs), flat, kernel, bias, params)
        return y.reshape(*x.shape[:-1], *self.layout.out_shape)

    def _dropped(self, x: Array, methods, configs, params, key: Array) -> Array:
        """The updates with dropout on their inputs, float32 `[N, features]`."""
        parts = []
        for i, (method, config) in enumerate(zip(methods, configs, strict=True)):
            features = self.layout.part_features(i)
            if method is None:
                parts.append(jnp.zeros((x.shape[0], features), jnp.float32))
                continue
            keep = 1.0 - config.dropout
            mask = jax.random.bernoulli(jax.random.fold_in(key, i), keep, x.shape)
            dropped = jnp.where(mask, x / keep, 0).astype(x.dtype)
            parts.append(method.delta(config, features, dropped, params[i]))
        return self.layout.join(parts)

    def _index(self, name: str) -> int:
        names = [part.name for part in self.parts]
        if name not in names:
            raise KeyError(f"projection {self.path!r} has the parts {', '.join(names)}, not {name!r}")
        return names.index(name)

    def part(self, y: Array, name: str) -> Array:
        """One part of an output: `y [..., *out_shape]` → `[..., features of the part]`, in HuggingFace's order."""
        return self.layout.take(y, self._index(name))

    def part_features(self, name: str) -> int:
        """Output features of one part."""
        return self.layout.part_features(self._index(name))

    def part_axes(self, name: str) -> tuple[str, str]:
        """Logical names of a part seen as a matrix `[in, out]`; `out` goes by its major axis that parts don't share."""
        rest = [i for i in range(len(self.layout.out_shape)) if i != self.layout.part_axis or len(self.parts) == 1]
        return self.axes[0], self.axes[1 + rest[0]]

    def module_path(self, name: str, layer: int | str | None) -> str:
        """HuggingFace's path of one part in one layer, such as `model.layers.3.self_attn.q_proj`."""
        return self.path.format(layer=layer, name=name)

    def part_slice(self, name: str) -> tuple[slice, ...]:
        """Index of a part in `[..., *out_shape]`, to be used behind an Ellipsis."""
        i = self._index(name)
        start = sum(self.layout.sizes[:i])
        index = [slice(None)] * len(self.layout.out_shape)
        index[self.layout.part_axis] = slice(start, start + self.layout.sizes[i])
        return tuple(index)

    def part_weight(self, name: str) -> Array:
        """The kernel of one part, `[*layers, in, features of the part]`, in HuggingFace's order of features."""
        return self.layout.take(self.kernel[...], self._index(name))

    def part_bias(self, name: str) -> Array | None:
        """The bias of one part, `[*layers, features of the part]`."""
        return None if self.bias is None else self.layout.take(self.bias[...], self._index(name))

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Puts an adapter (stacked like the kernel) on one part."""
        self._index(name)
        self.adapters[name] = adapter

    def remove_adapters(self) -> None:
        """Takes every adapter off; the kernel stays as it is."""
        for name in list(self.adapters):
            del self.adapters[name]

    def merge_adapters(self) -> None:
        """Folds every adapter into the kernel, layer by layer: summed in float32, rounded once."""
        for name, adapter in list(self.adapters.items()):
            index = (..., *self.part_slice(name))
            shape = self.layout.part_shape(self._index(name))

            def one(operands, adapter=adapter, index=index, shape=shape):
                kernel, params = operands
                delta = adapter.dense(adapter.config, adapter.in_features, adapter.out_features, params)
                total = kernel[index].astype(jnp.float32) + delta.reshape(self.in_features, *shape)
                return kernel.at[index].set(total.astype(kernel.dtype))

            operands = (self.kernel[...], adapter.params())
            self.kernel[...] = one(operands) if self.num_layers is None else jax.lax.map(one, operands)
            del self.adapters[name]
