"""The decoder's slot for a frozen, perhaps adapted, matrix product: stacked by layer, several named matrices fused.

Query, key and value share one input, so they are one kernel in memory; so are gate and up. Names stay separate
outside: adapters, targets, import and export know `q_proj`, not the fusion. A stacked projection holds every layer's
kernel with a leading layer axis; the decoder scans over layers and calls it on the slices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from mora_jax.adapters.base import Adapter, Params, params_of
from mora_jax.adapters.matrices import Matrix
from mora_jax.adapters.products.around import update_of
from mora_jax.adapters.products.matmul import (
    FusedLayout,
    Kernel,
    TransposedKernel,
    adapted_dot,
    decoder_dot,
    fused_update,
    matrix_for,
    wide,
    widened,
)
from mora_jax.adapters.products.quantization import Quantized, QuantizedKernel

Dropout = Callable[[int, Array], Array]


def adapted_product(
    layout: FusedLayout,
    adapters: tuple[Adapter | None, ...],
    x: Array,
    kernel: Kernel,
    bias: Array | None,
    dropout: Dropout | None = None,
) -> Array:
    """The output of matrices that share one input, each with its adapter or without.

    Each is `gain ⊙ (T(x) K(W) + delta(T(x))) + bias` (see `Adapter`), with the one derivative of `adapted_dot`.

    Args:
        layout: how the matrices lie in the output.
        adapters: one a matrix, on leaves without layer axis; None for a bare matrix.
        x: `[N, in]` in the compute dtype.
        kernel: `[in, *layout.out_shape]` or `[in, features]`, perhaps quantised.
        bias: `[*layout.out_shape]` or None.
        dropout: `(number of the part, x) → x` for the adapters' inputs; None without dropout.

    Returns:
        `[N, layout.features]` in the dtype of `x`.
    """
    params = tuple(None if adapter is None else params_of(adapter) for adapter in adapters)
    inputs = [
        None if adapter is None or p is None else adapter.transform_input(adapter.config, p, x)
        for adapter, p in zip(adapters, params, strict=True)
    ]
    if all(transformed is None for transformed in inputs):
        return _Matrices(layout, adapters, params, kernel, x).product(x, bias, dropout)
    outputs = []
    for i, transformed in enumerate(inputs):  # matrices whose inputs differ are as many products
        single = layout.single(i)
        matrices = _Matrices(single, (adapters[i],), (params[i],), _kernel_of(layout, kernel, i), x)
        drop = None if dropout is None else (lambda _, x, i=i: dropout(i, x))
        part_bias = None if bias is None else layout.take(bias, i)
        outputs.append(matrices.product(x if transformed is None else transformed, part_bias, drop))
    return layout.join(outputs)


def _kernel_of(layout: FusedLayout, kernel: Kernel, index: int) -> Array | Quantized:
    """The kernel of one matrix; quantised as that of all is."""
    if isinstance(kernel, TransposedKernel):
        kernel = kernel.dense()
    return jax.tree.map(lambda array: layout.take(array.reshape(len(array), *layout.out_shape), index), kernel)


def joined(layout: FusedLayout, parts: list[Array | None], dtype: Any, *shape: int, fill: float = 0.0) -> Array | None:
    """What each matrix has, `[*shape, features]`, side by side, `fill` for one without; None where none has."""
    if all(part is None for part in parts):
        return None
    sizes = map(layout.part_features, range(len(parts)))
    full = (jnp.full((*shape, n), fill, dtype) if p is None else p for p, n in zip(parts, sizes, strict=True))
    return layout.join([part.astype(dtype) for part in full])


class _Matrices(NamedTuple):
    """Matrices with one input that no adapter transforms.

    Attributes:
        layout, adapters, kernel: as in `adapted_product`.
        params: the arrays of the adapters.
        inputs: what the layer was given, behind which a quantised kernel is made dense.
    """

    layout: FusedLayout
    adapters: tuple[Adapter | None, ...]
    params: tuple[Params | None, ...]
    kernel: Kernel
    inputs: Array

    def product(self, x: Array, bias: Array | None, dropout: Dropout | None) -> Array:
        """`adapted_product` of `x`."""
        gain, bias = self._gain(), self._bias(bias)
        methods = {type(adapter) for adapter in self.adapters if adapter is not None and adapter.additive}
        delta = None
        if dropout is None and len(methods) == 1:
            configs = (a.config if a is not None and a.additive else None for a in self.adapters)
            delta = methods.pop().fuse(self.layout, tuple(configs))
        if dropout is not None:
            return adapted_dot(None, x, self.kernel, bias, None, gain, self._updates(x, dropout))
        update = self._updates(x, None) if delta is None else None
        pairs = zip(self.adapters, self.params, strict=True)
        additive = tuple(p if adapter is not None and adapter.additive else None for adapter, p in pairs)
        params = None if delta is None else additive
        if not any(adapter is not None and adapter.transforms_kernel for adapter in self.adapters):
            return adapted_dot(delta, x, self.kernel, bias, params, gain, update)

        def product(x: Array, arrays: Any) -> Array:
            matrices = self._replace(params=arrays)
            return adapted_dot(delta, x, matrices._transformed_kernel(), bias, params, gain, update)

        # The backward pass makes the kernel again rather than keep one a layer.
        return jax.checkpoint(product)(x, self.params)

    def _dense(self, index: int) -> Array:
        """The kernel of one matrix, dense: what a quantised one is in a product."""
        part = _kernel_of(self.layout, self.kernel, index)
        return matrix_for(part, lax.stop_gradient(self.inputs)) if isinstance(part, Quantized) else part

    def _each(self, one: Callable[[int, Adapter, Params], Array | None]) -> list[Array | None]:
        pairs = enumerate(zip(self.adapters, self.params, strict=True))
        return [None if a is None or p is None else one(i, a, p) for i, (a, p) in pairs]

    def _joined(self, parts: list[Array | None], *shape: int, fill: float = 0.0) -> Array | None:
        return joined(self.layout, parts, wide(self.inputs.dtype), *shape, fill=fill)

    def _transformed_kernel(self) -> Array:
        """The kernel, its parts transformed whose adapters do that: float32 `[in, features]`."""
        transformed = self._each(
            lambda i, a, p: a.transform_kernel(a.config, p, self._dense(i)) if a.transforms_kernel else None
        )
        parts = [widened(self._dense(i)) if part is None else part for i, part in enumerate(transformed)]
        return self.layout.join(parts)

    def _gain(self) -> Array | None:
        """The gains of all matrices, float32 `[features]`; None where none has one."""
        gains = self._each(lambda i, a, p: a.output_gain(a.config, p, partial(self._dense, i)))
        return self._joined(gains, fill=1.0)

    def _bias(self, bias: Array | None) -> Array | None:
        """The layer's bias with what adapters add to it; flat float32 where they add anything."""
        added = self._joined(
            self._each(lambda i, a, p: a.added_bias(a.config, p, None if bias is None else self.layout.take(bias, i)))
        )
        return bias if added is None else added if bias is None else widened(bias.reshape(-1)) + added

    def _updates(self, x: Array, dropout: Dropout | None) -> Array | None:
        """The updates one by one, float32 `[N, features]`: of methods without a joint form, or with dropout."""

        def one(i: int, adapter: Adapter, params: Params) -> Array | None:
            features, config = self.layout.part_features(i), adapter.config
            inputs = x if dropout is None or not config.dropout else dropout(i, x)
            single = self.layout.single(i)
            if adapter.additive and (delta := adapter.fuse(single, (config,))) is not None:
                return fused_update(delta, inputs, (params,))
            if dropout is None and not adapter.additive:
                return None  # a transformed kernel is in the product
            return update_of(type(adapter), config, params, inputs, features, partial(self._dense, i), decoder_dot)

        return self._joined(self._each(one), len(x))


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


def normal(scale: float, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal numbers drawn in float32, so that one key gives one model in every dtype."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def drawn(rngs: nnx.Rngs | None, scale: float, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal numbers of deviation `scale`; zeros without `rngs`, for a loader to fill."""
    return jnp.zeros(shape, dtype) if rngs is None else normal(scale, rngs.params(), shape, dtype)


class Projection(nnx.Module):
    """`y = x W + b + updates`, W frozen, perhaps quantised, unless full fine-tuning makes it a trained master.

    Args:
        parts: the named matrices, in the order in which they lie along `out_shape[part_axis]`.
        in_features: size of the input.
        out_shape: axes of the output; their product is the number of output features.
        part_axis: the axis of `out_shape` that the parts share.
        axes: logical names of `[in, *out_shape]`.
        num_layers: length of the stack, or None for a single projection.
        numbers: of its layers in the model; () where these are all, in order.
        experts: how many matrices each layer has, of which `ExpertProjection` takes one a row; None for one.
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
        numbers: tuple[int, ...] = (),
        experts: int | None = None,
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
        self.numbers = numbers
        self.path = path
        lengths = {"layers": num_layers, "experts": experts}
        self.stack_axes = names = tuple(name for name, length in lengths.items() if length is not None)
        self.stack = stack = tuple(length for length in lengths.values() if length is not None)
        shape = (*stack, in_features, *out_shape)
        kernel: Any
        if quantize is None:
            kernel = nnx.Param(drawn(rngs, init_std, shape, dtype), axes=(*names, *axes), out_axes=len(out_shape))
        elif rngs is None:
            kernel = QuantizedKernel(quantize, shape, axes=(*names, *axes), out_axes=len(out_shape), dtype=dtype)
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
        adapters = tuple(self.adapters.get(part.name) for part in self.parts)
        dropout = None
        if token_dropout is not None and any(a is not None and a.config.dropout > 0 for a in adapters):

            def dropout(i: int, x: Array) -> Array:
                return token_dropout.fold(i).drop(x, adapters[i].config.dropout)

        y = adapted_product(layout, adapters, rows, kernel, bias, dropout)
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
        stack = self.stack_axes
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

    def with_axes(self, array: Array) -> Array:
        """A kernel, or what a quantised one has in its place, `[*layers, in, *out_shape]`."""
        return array.reshape(*array.shape[: len(self.stack) + 1], *self.layout.out_shape)

    def number(self, layer: int) -> int:
        """The number in the model of a layer of the stack."""
        return self.numbers[layer] if self.numbers else layer

    def module_path(self, name: str, layer: int | str | None, expert: int | str | None = None) -> str:
        """HuggingFace's path of one part in one layer of the stack, such as `model.layers.3.self_attn.q_proj`."""
        layer = self.number(layer) if isinstance(layer, int) else layer
        return self.path.format(layer=layer, expert=expert, name=name)

    def module_paths(self, name: str) -> tuple[str, ...]:
        """HuggingFace's paths of one part, one for each matrix of the stack; of a single projection one."""
        return tuple(self.module_path(name, *numbers) for numbers in np.ndindex(*self.stack or (1,)))

    def part_slice(self, number: int) -> tuple[slice, ...]:
        """Index of a part in `[..., *out_shape]`, to be used behind an Ellipsis."""
        return self.slice_of(sum(self.layout.sizes[:number]), self.layout.sizes[number])

    def slice_of(self, start: int, size: int) -> tuple[slice, ...]:
        """The same of so many entries along the part axis."""
        index = [slice(None)] * len(self.layout.out_shape)
        index[self.layout.part_axis] = slice(start, start + size)
        return tuple(index)


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

    @property
    def matrix(self) -> Matrix:
        """How the table is the matrix `[D, V]`."""
        return Matrix("kernel", tuple(self.kernel.shape), (1,), (0,), (0,))
