"""The decoder's slot for a frozen, perhaps adapted, matrix product: stacked by layer, several named matrices fused.

Query, key and value share one input, so they are one kernel in memory; so are gate and up. Names stay separate
outside: adapters, targets, import and export know `q_proj`, not the fusion. A stacked projection holds every layer's
kernel with a leading layer axis; the decoder scans over layers and calls it on the slices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.base import Adapter
from mora_jax.adapters.products.adapted_matmul import adapted_product
from mora_jax.adapters.products.fused import FusedLayout
from mora_jax.adapters.products.quantization import QuantizedKernel

Array = jax.Array


class TokenDropout(NamedTuple):
    """What the masks of the adapters' dropout are drawn from.

    Every token has a key of its own, made of the place in the network and the token's number in the step. So a mask
    doesn't depend on which other tokens are computed beside it: in one micro-batch or several, on one device, on a mesh
    that cuts rows along their length or not, or under `pmap`.

    Attributes:
        key: of the place in the network.
        tokens: uint32, the number of each token in the step, shaped like the tokens.
    """

    key: Array
    tokens: Array

    @classmethod
    def of(cls, key: Array, rows: int, length: int, numbers: Array | None = None) -> TokenDropout:
        """For tokens `[rows, length]`.

        Args:
            key: of the step.
            rows, length: of the tokens.
            numbers: int `[rows]`, the number of each row in the step; None: they are all of it, in order.
        """
        numbers = jnp.arange(rows) if numbers is None else numbers
        tokens = numbers.astype(jnp.uint32)[:, None] * jnp.uint32(length) + jnp.arange(length, dtype=jnp.uint32)
        return cls(key, tokens)

    def fold(self, number: Array | int) -> TokenDropout:
        """For one of several places."""
        return self._replace(key=jax.random.fold_in(self.key, number))

    def drop(self, x: Array, rate: float) -> Array:
        """`x [N, in]`, a row for each of the tokens: numbers are left out with probability `rate`, the others scaled up
        so that the sum stays the same on average."""
        keep = 1.0 - rate

        def mask(token: Array) -> Array:
            return jax.random.bernoulli(jax.random.fold_in(self.key, token), keep, x.shape[1:])

        return jnp.where(jax.vmap(mask)(self.tokens.reshape(-1)), x / keep, 0).astype(x.dtype)


@dataclass(frozen=True)
class Part:
    """A named matrix inside a projection: `size` entries along the projection's part axis."""

    name: str
    size: int


class Projection(nnx.Module):
    """`y = x W + b + updates`, W frozen, perhaps quantised, unless full fine-tuning makes it a trained master.

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
        quantize: how the kernel is held, a format of `quantized.FORMATS`; None: as it is. It is loaded, never drawn.
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
        quantize: str | None = None,
    ):
        if sum(part.size for part in parts) != out_shape[part_axis]:
            sizes = [part.size for part in parts]
            raise ValueError(f"parts of sizes {sizes} don't fill axis {part_axis} of out_shape {out_shape}")
        self.parts = tuple(parts)
        self.in_features = in_features
        self.layout = FusedLayout(tuple(out_shape), part_axis, tuple(part.size for part in parts))
        self.axes = tuple(axes)
        self.num_layers = num_layers
        self.path = path
        stack = () if num_layers is None else (num_layers,)
        names = ("layers",) * len(stack)
        shape = (*stack, in_features, *out_shape)
        kernel: Any
        if quantize is None:
            numbers = jnp.zeros(shape, dtype)
            if rngs is not None:
                numbers = (jax.random.normal(rngs.params(), shape, jnp.float32) * init_std).astype(dtype)
            kernel = nnx.Param(numbers, axes=(*names, *axes), out_axes=len(out_shape))
        elif rngs is None:
            out_axes = len(self.layout.out_shape)
            kernel = QuantizedKernel(quantize, shape, axes=(*names, *axes), out_axes=out_axes, dtype=dtype)
        else:
            raise ValueError(f"a kernel in {quantize} can't be drawn at random: its numbers are those of a file")
        self.kernel = kernel
        bias = nnx.Param(jnp.zeros((*stack, *out_shape), dtype), axes=(*names, *axes[1:])) if use_bias else None
        self.bias = nnx.data(bias)
        self.adapters: Any = nnx.Dict()

    def __call__(
        self,
        x: Array,
        *,
        token_dropout: TokenDropout | None = None,
        lead: int = 0,
        flat: bool = False,
        sharded: bool = False,
    ) -> Array:
        """`x [..., in]` → `[..., *out_shape]` in the dtype of `x`, on leaves without layer axis.

        Args:
            x: input in the compute dtype.
            token_dropout: turns the adapters' dropout on; each part draws its own mask.
            lead: the axis of `out_shape` that stands first in the kernel, which is `[in, lead axis, other axes]`:
                flattened, it is cut into blocks of whole columns, as a mesh shards it.
            flat: whether the outputs stay one axis, `[..., features]`, in the order of `out_shape`; without `lead`.
            sharded: whether devices share the inputs or the outputs, which adapters that sum features ask.
        """
        rows = x.reshape(-1, self.in_features)
        # The kernel is stored in the compute dtype; a trained float32 master is cast here, inside the product.
        kernel = self.kernel.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        layout = replace(self.layout, sharded=sharded)
        if lead:
            layout = _led_by(layout, lead)
            bias = None if bias is None else jnp.moveaxis(bias, lead, 0)
        found = tuple(self.adapters.get(part.name) for part in self.parts)
        dropout = None
        if token_dropout is not None and any(a is not None and a.config.dropout > 0 for a in found):

            def dropout(i: int, x: Array) -> Array:
                return token_dropout.fold(i).drop(x, found[i].config.dropout)

        y = adapted_product(layout, found, rows, kernel, bias, dropout)
        if flat:
            return y.reshape(*x.shape[:-1], layout.features)
        y = y.reshape(*x.shape[:-1], *layout.out_shape)
        return jnp.moveaxis(y, x.ndim - 1, x.ndim - 1 + lead) if lead else y

    @property
    def quantized(self) -> str | None:
        """The format of the kernel; None where it is held as it is."""
        return self.kernel.format if isinstance(self.kernel, QuantizedKernel) else None

    def lay_kernel(self, *, flat: bool) -> None:
        """Stores the kernel as matrices, `[*layers, in, features]`, or with the axes of `out_shape`.

        TPUs tile the last two axes of an array: between the two forms they move every number. Everything that reads or
        writes a kernel takes both.
        """
        out = (self.layout.features,) if flat else self.layout.out_shape
        quantized = isinstance(self.kernel, QuantizedKernel)
        stack = ("layers",) * (self.num_layers is not None)
        stored = [(self.kernel, "values"), (self.kernel, "scales")] if quantized else [(self, "kernel")]
        for owner, name in stored:
            variable = getattr(owner, name)
            shape = (*variable.shape[: len(stack) + 1], *out)
            if tuple(variable.shape) == shape:
                continue
            value, axes = variable.get_value(), (*stack, *self.axes[: 1 + len(out)])
            abstract = isinstance(value, jax.ShapeDtypeStruct)
            value = jax.ShapeDtypeStruct(shape, value.dtype) if abstract else value.reshape(shape)
            setattr(owner, name, variable.replace(value, axes=axes, out_axes=len(out)))
        if quantized:
            self.kernel.out_axes = len(out)

    def _with_axes(self, array: Array) -> Array:
        """A kernel, or what a quantised one has in its place, `[..., *out_shape]`."""
        out = self.layout.out_shape
        return array if array.shape[-len(out) :] == out else array.reshape(*array.shape[:-1], *out)

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
        if self.quantized is not None:
            index = self._index(name)
            taken = jax.tree.map(lambda array: self.layout.take(self._with_axes(array), index), self.kernel.get_value())
            return taken.dense(self.kernel.dtype, 1)
        return self.layout.take(self._with_axes(self.kernel[...]), self._index(name))

    def part_bias(self, name: str) -> Array | None:
        """The bias of one part, `[*layers, features of the part]`."""
        return None if self.bias is None else self.layout.take(self.bias[...], self._index(name))

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Puts an adapter (stacked like the kernel) on one part."""
        self._index(name)
        self.adapters[name] = adapter

    def put_part_weight(self, name: str, weight: Array) -> None:
        """Writes the kernel of one part, laid out as `part_weight` gives it."""
        shape = self.layout.part_shape(self._index(name))
        kernel = self._with_axes(self.kernel[...])
        shaped = weight.reshape(*kernel.shape[: kernel.ndim - len(shape)], *shape)
        changed = kernel.at[(..., *self.part_slice(name))].set(shaped.astype(kernel.dtype))
        self.kernel[...] = changed.reshape(self.kernel.shape)

    def add_to_part_bias(self, name: str, change: Array) -> None:
        """Adds `change [*layers, features of the part]` to the bias; makes one where there is none."""
        stack = () if self.num_layers is None else (self.num_layers,)
        if self.bias is None:
            zeros = jnp.zeros((*stack, *self.layout.out_shape), self.kernel.dtype)
            self.bias = nnx.Param(zeros, axes=(*("layers",) * len(stack), *self.axes[1:]))
        bias = self.bias[...]
        index = (..., *self.part_slice(name))
        total = bias[index].astype(jnp.float32) + change.reshape(*stack, *self.layout.part_shape(self._index(name)))
        self.bias[...] = bias.at[index].set(total.astype(bias.dtype))


def _led_by(layout: FusedLayout, lead: int) -> FusedLayout:
    """The layout with the axis `lead` of its output moved to the front."""
    order = [lead, *(i for i in range(len(layout.out_shape)) if i != lead)]
    shape = tuple(layout.out_shape[i] for i in order)
    return replace(layout, out_shape=shape, part_axis=order.index(layout.part_axis))


class OutputHead(nnx.Module):
    """A frozen, perhaps adapted, table of output weights.

    Attributes:
        kernel: `[V, D]`, as in files.
        path: HuggingFace module path.
        adapter: on the matrix `[D, V]`, or None.
    """

    def __init__(self, table: Array, *, path: str):
        """Takes the `table`, logical axes `("vocab", "embed")`."""
        self.kernel = nnx.Param(table, axes=("vocab", "embed"))
        self.path = path
        self.adapter: Any = nnx.data(None)

    def table(self) -> Array:
        """The table `[V, D]`: as stored, or float32 where an adapter is added."""
        kernel = self.kernel[...]
        if self.adapter is None:
            return kernel
        return self.adapter.merged(kernel.astype(jnp.float32).T).T

    def put_adapter(self, adapter: Adapter, rngs: nnx.Rngs | None) -> None:
        """Adds `adapter` to a head that has none."""
        self.adapter = adapter

    def take_adapter(self) -> None:
        """Takes the adapter off."""
        self.adapter = nnx.data(None)
