"""An adapter around a layer's own call, for Flax's layers and those of other people, NNX and Linen.

`y = call(T(x))` stays the layer's; the change of the kernel, the update, the gain and the bias are added to it:
`y + (gain - 1) ⊙ (y - b) + gain ⊙ (x (K(W) - W) + delta(x)) + added bias`. All of it is plain JAX, so every
transformation works: both modes of differentiation, `jax.vmap`, `jax.lax.scan`, `jax.checkpoint`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mora_jax.adapters.base import Params
from mora_jax.adapters.matrices import Product
from mora_jax.adapters.products.explicit_mesh import placed_like
from mora_jax.adapters.products.matmul import Dot, dot, widened


def around(
    method: Any,
    config: Any,
    params: Params,
    product: Product,
    call: Callable[[Array], Array],
    inputs: Array,
    kernel: Array,
    bias: Array | None,
    key: Array | None = None,
) -> Array:
    """What a layer with an adapter gives for `inputs`.

    On a mesh with Explicit axes the adapter is computed with the axes Auto, and placed as the layer's own output is.

    Args:
        method, config, params: of the adapter.
        product: how the call is a product with a matrix.
        call: the plain layer.
        inputs: as the layer takes them.
        kernel, bias: the layer's own arrays; the bias may be None.
        key: of the dropout on the adapter's input; None without.

    Returns:
        As `call`.
    """
    if product.convolve is None and method.transforms_input(config, params, product.matrix.in_features):

        def transformed(inputs: Array, params: Params) -> Array:
            flat = product.flat(inputs)
            rows = method.transform_input(config, params, flat.reshape(-1, flat.shape[-1]))
            return product.unflat(rows.reshape(flat.shape))

        inputs = placed_like(inputs, transformed, inputs, params)
    y = call(inputs)
    run = partial(beside, method, config, product)
    return placed_like(y, run, y, inputs, params, kernel, bias, key)


def beside(
    method: Any,
    config: Any,
    product: Product,
    y: Array,
    inputs: Array,
    params: Params,
    kernel: Array,
    bias: Array | None,
    key: Array | None,
) -> Array:
    """The layer's own output `y` for `inputs` with what the adapter does to it."""
    take, total = partial(product.matrix.take, kernel), widened(y)
    bias = None if bias is None else product.matrix.take_bias(bias)
    x = product.flat(inputs.astype(y.dtype))  # [..., in]; of a convolution as it is
    apart = product.convolve is not None and not (method.by_products and product.matrix.groups == 1)

    def spread(vector: Array) -> Array:
        return product.shaped(vector.reshape(*[1] * (x.ndim - 1), -1))

    gain = None if apart else method.output_gain(config, params, take)
    if gain is not None:
        gain = spread(gain)
        # As a change, so that a gain of 1 changes no bit.
        total = total + (gain - 1.0) * (total if bias is None else total - spread(widened(bias)))
    if product.convolve is not None and (apart or method.additive):
        x = x if key is None else dropped(x, config.dropout, key)
        update = _convolution(method, config, params, product, x, None if not apart else take())
        total = total + (update if gain is None else update * gain)
    elif method.additive or method.transforms_kernel:
        x = x if key is None else dropped(x, config.dropout, key)
        out_features = product.matrix.out_features
        update = update_of(method, config, params, x.reshape(-1, x.shape[-1]), out_features, take)
        update = product.shaped(update.reshape(*x.shape[:-1], out_features))
        total = total + (update if gain is None else update * gain)
    more = method.added_bias(config, params, bias)
    return (total if more is None else total + spread(more)).astype(y.dtype)


class Windows(NamedTuple):
    """The input of a convolution, of which a method takes products only, as it does of rows.

    Attributes:
        x: `[batch, …, channels]`.
        product: the layer's.
    """

    x: Array
    product: Product

    @property
    def dtype(self) -> Any:
        """Of the input."""
        return self.x.dtype

    @classmethod
    def dot(cls, x: Any, kernel: Array) -> Array:
        """`dot`, of windows with a matrix `[window · channels, n]`: a convolution, `[batch, …, n]`."""
        if not isinstance(x, Windows):
            return dot(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)
        assert x.product.convolve is not None, "there are windows in a convolution alone"
        shape = *x.product.matrix.shape[:-1], kernel.shape[-1]
        return widened(x.product.convolve(x.x, kernel.astype(x.dtype).reshape(shape)))


def _convolution(method: Any, config: Any, params: Params, product: Product, x: Array, kernel: Array | None) -> Array:
    """What an adapter adds to a convolution of `x`: by two of them, as PEFT does, where the method takes products.

    Others, and groups of channels, take one with the change of the kernel `[in, out]`, which is of its size.
    """
    windows: Any = Windows(x, product)
    if kernel is None:
        return method.delta(config, product.matrix.out_features, windows, params, Windows.dot)

    def change(params: Params, kernel: Array) -> Array:
        return (method.merged_kernel(config, params, kernel) - widened(kernel)).astype(x.dtype)

    return Windows.dot(windows, jax.checkpoint(change)(params, kernel))


def dropped(x: Array, rate: float, key: Array) -> Array:
    """`x` with features left out with probability `rate`, the others scaled up so that the mean stays the same."""
    mask = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(mask, x / (1.0 - rate), 0.0).astype(x.dtype)


def update_of(
    method: Any,
    config: Any,
    params: Params,
    x: Array,
    out_features: int,
    kernel: Callable[[], Array],
    product: Dot = dot,
) -> Any:
    """What an adapter adds to `x W` for `x [N, in]`, `[N, out]`; `kernel()` is W `[in, out]`."""
    update = method.delta(config, out_features, x, params, product) if method.additive else None
    if not method.transforms_kernel:
        return update

    def changed(x: Array, params: Params, kernel: Array) -> Array:
        return product(x, method.transform_kernel(config, params, kernel) - widened(kernel))

    change = jax.checkpoint(changed)(x, params, kernel())  # the backward pass makes the kernel again
    return change if update is None else update + change


def embedded(
    method: Any, config: Any, params: Params, call: Callable[[Array], Array], ids: Array, table: Array
) -> Array:
    """Looked-up rows of a table with an adapter, as `call(ids)`; dropout doesn't act on token ids, as in PEFT."""
    y = call(ids)

    def run(y: Array, ids: Array, params: Params, table: Array) -> Array:
        total = widened(y) + method.rows(ids, y.dtype, params)
        gain = method.output_gain(config, params, lambda: table)
        return (total if gain is None else total * gain).astype(y.dtype)

    return placed_like(y, run, y, ids, params, table)


def attended(
    method: Any, config: Any, params: Params, call: Callable[[Array], Array], query: Array, table: Array
) -> Array:
    """Products with every row of an adapted table (a tied output head), as `call(query)`."""

    def scaled(query: Array, params: Params, table: Array) -> Array:
        gain = method.output_gain(config, params, lambda: table)
        return query if gain is None else (query * gain).astype(query.dtype)

    def run(y: Array, query: Array, params: Params) -> Array:
        return (y + method.scores(query.astype(y.dtype), params)).astype(y.dtype)

    query = placed_like(query, scaled, query, params, table)
    y = call(query)
    return placed_like(y, run, y, query, params)
