"""One adapted projection in its general form: `y = gain ⊙ (T(x) K(W) + delta(T(x))) + bias`.

Methods that only add (LoRA, MoRA) take `adapted_dot`, whose backward is written out; transforms of the input and of the
kernel, a gain on outputs, or a trained bias are put around it here, for several matrices with one input as for one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax.adapters.base import Adapter, params_of
from mora_jax.adapters.products.fused import FusedLayout, PartwiseDelta
from mora_jax.adapters.products.matmul import (
    Delta,
    Kernel,
    Turned,
    adapted_dot,
    added,
    base_product,
    dot32,
    dot32_nt,
    dot32_tn,
    kernel_tangent,
    matrix_for,
    perturbed_product,
    trained_dot,
    widened,
)
from mora_jax.adapters.products.quantization import Quantized
from mora_jax.adapters.products.tangent import any_perturbed, linear

Array = jax.Array
Dropout = Callable[[int, Array], Array]


def adapted_product(
    layout: FusedLayout,
    adapters: tuple[Adapter | None, ...],
    x: Array,
    kernel: Kernel,
    bias: Array | None,
    dropout: Dropout | None = None,
    stored: Callable[[], Array] | None = None,
) -> Array:
    """The output of matrices that share one input, each with its adapter or without.

    Args:
        layout: how the matrices lie in the output.
        adapters: one a matrix, on leaves without layer axis; None for a bare matrix.
        x: `[N, in]` in the compute dtype.
        kernel: `[in, *layout.out_shape]` or `[in, features]`, perhaps quantised.
        bias: `[*layout.out_shape]` or None.
        dropout: `(number of the part, x) → x` for the adapters' inputs; None without dropout.
        stored: gives the kernel as it is stored, where `kernel` is rounded to the compute dtype: a gain is that of the
            kernel which is merged.

    Returns:
        `[N, layout.features]` in the dtype of `x`.
    """
    params = tuple(None if a is None else params_of(a) for a in adapters)
    inputs = [
        None if a is None or p is None else a.transform_input(a.config, p, x)
        for a, p in zip(adapters, params, strict=True)
    ]
    if all(own is None for own in inputs):
        return _one_input(layout, adapters, params, x, kernel, bias, dropout, stored)
    parts = []
    for i, own in enumerate(inputs):  # matrices whose inputs differ are as many products
        alone = FusedLayout((layout.part_features(i),), 0, (layout.part_features(i),), layout.sharded)
        part_bias = None if bias is None else layout.take(bias, i)
        drop = None if dropout is None else (lambda _, x, i=i: dropout(i, x))
        part, own_stored = _taken(layout, kernel, i), stored if len(inputs) == 1 else None
        own = x if own is None else own
        parts.append(_one_input(alone, (adapters[i],), (params[i],), own, part, part_bias, drop, own_stored))
    return layout.join(parts)


def _one_input(layout, adapters, params, x, kernel, bias, dropout, stored) -> Array:
    """`adapted_product` behind what the adapters do to its input."""
    gain = _gain(layout, adapters, params, kernel if stored is None else stored(), x)
    bias = _bias(layout, adapters, params, bias)
    methods = tuple(type(a) if a is not None and a.additive else None for a in adapters)
    configs = tuple(a.config if a is not None and a.additive else None for a in adapters)
    if dropout is not None:
        y = adapted_dot(None, x, kernel, bias if gain is None else None, None)
        y = widened(y)
        y = y + _dropped(layout, adapters, params, x, kernel, dropout)
        if gain is not None:
            y = y * gain
            y = y if bias is None else y + widened(bias.reshape(-1))
        return y.astype(x.dtype)
    kinds = {method for method in methods if method is not None}
    delta: Delta | None = kinds.pop().fuse(layout, configs) if len(kinds) == 1 else None
    if delta is None and any(method is not None for method in methods):
        delta = PartwiseDelta(layout, methods, configs)

    def product(x, kernel, bias, gain, params):
        kernel = _kernel(layout, adapters, params, kernel, x)
        arrays = None
        if delta is not None:
            arrays = tuple(p if method is not None else None for p, method in zip(params, methods, strict=True))
        if gain is None:
            return adapted_dot(delta, x, kernel, bias, arrays)
        return scaled_dot(delta, x, kernel, bias, gain, arrays)

    if any(a is not None and a.transforms_kernel for a in adapters):
        product = jax.checkpoint(product)  # the backward pass makes the kernel again rather than keep one a layer
    return product(x, kernel, bias, gain, params)


def _taken(layout: FusedLayout, kernel: Kernel, index: int) -> Array | Quantized:
    """The kernel of one part; quantised as the whole is."""
    if isinstance(kernel, Turned):
        kernel = kernel.dense()
    return jax.tree.map(lambda array: layout.take(array.reshape(len(array), *layout.out_shape), index), kernel)


def _dense_part(layout: FusedLayout, kernel: Kernel, index: int, x: Array) -> Array:
    """The kernel of one part, dense: what a quantised one is in a product with `x`."""
    part = _taken(layout, kernel, index)
    return matrix_for(part, lax.stop_gradient(x)) if isinstance(part, Quantized) else part


def _kernel(layout: FusedLayout, adapters, params, kernel: Kernel, x: Array) -> Kernel:
    """The kernel, its parts transformed whose adapters do that; where one does, it is float32 `[in, features]`."""
    if not any(a is not None and a.transforms_kernel for a in adapters):
        return kernel
    parts = []
    for i, (adapter, p) in enumerate(zip(adapters, params, strict=True)):
        part = _dense_part(layout, kernel, i, x)
        changes = adapter is not None and adapter.transforms_kernel
        parts.append(adapter.transform_kernel(adapter.config, p, part) if changes else widened(part))
    return layout.join(parts)


def _gain(layout: FusedLayout, adapters, params, kernel: Kernel, x: Array) -> Array | None:
    """The gains of all parts, float32 `[features]`; None where no part has one."""
    gains = [
        None if a is None else a.output_gain(a.config, p, partial(_dense_part, layout, kernel, i, x))
        for i, (a, p) in enumerate(zip(adapters, params, strict=True))
    ]
    if all(gain is None for gain in gains):
        return None
    ones = [jnp.ones((layout.part_features(i),), jnp.float32) if g is None else g for i, g in enumerate(gains)]
    return layout.join(ones)


def _bias(layout: FusedLayout, adapters, params, bias: Array | None) -> Array | None:
    """The layer's bias with what adapters add to it; flat float32 where they add anything."""
    added = [
        None if a is None else a.added_bias(a.config, p, None if bias is None else layout.take(bias, i))
        for i, (a, p) in enumerate(zip(adapters, params, strict=True))
    ]
    if all(value is None for value in added):
        return bias
    zeros = [jnp.zeros((layout.part_features(i),), jnp.float32) if b is None else b for i, b in enumerate(added)]
    total = layout.join(zeros)
    return total if bias is None else widened(bias.reshape(-1)) + total


def _dropped(layout: FusedLayout, adapters, params, x: Array, kernel: Kernel, dropout: Dropout) -> Array:
    """The updates with dropout on their inputs, float32 `[N, features]`."""
    parts = []
    for i, (adapter, p) in enumerate(zip(adapters, params, strict=True)):
        features, update = layout.part_features(i), None
        if adapter is not None:
            own = dropout(i, x) if adapter.config.dropout > 0 else x
            base = partial(_dense_part, layout, kernel, i, x)
            update = update_of(type(adapter), adapter.config, p, own, features, base)
        parts.append(jnp.zeros((x.shape[0], features), jnp.float32) if update is None else update)
    return layout.join(parts)


def update_of(
    method: Any, config: Any, params: dict[str, Array], x: Array, out_features: int, kernel: Callable[[], Array]
) -> Array | None:
    """What an adapter adds to `x W` for `x [N, in]`, float32 `[N, out]`, or None; `kernel()` is W `[in, out]`."""
    update = method.delta(config, out_features, x, params) if method.additive else None
    if not method.transforms_kernel:
        return update

    def changed(x: Array, params: dict[str, Array], kernel: Array) -> Array:
        return trained_dot(x, method.transform_kernel(config, params, kernel) - widened(kernel))

    change = jax.checkpoint(changed)(x, params, kernel())  # the backward pass makes the kernel again
    return change if update is None else update + change


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def scaled_dot(delta: Delta | None, x: Array, kernel: Kernel, bias: Array | None, gain: Array, params: Any) -> Array:
    """`gain ⊙ (x @ kernel + delta(x)) + bias`, with the promises of `adapted_dot`; `gain` is float32 `[out]`."""
    return _finish(_sum(delta, x, kernel, params)[0], gain, bias).astype(x.dtype)


def _sum(delta, x, kernel, params):
    y = base_product(x, kernel)
    if delta is None:
        return y, None
    update, residuals = delta.forward(x, params)
    return y + update, residuals


def _finish(y, gain, bias):
    y = y * gain
    return y if bias is None else y + widened(bias.reshape(-1))


@partial(scaled_dot.defjvp, symbolic_zeros=True)
def _scaled_dot_jvp(delta, primals, tangents):
    x, kernel, bias, gain, params = primals
    moved = perturbed_product(delta, tangents)
    _, dkernel, dbias, dgain, _ = moved
    y, residuals = _sum(delta, x, kernel, params)
    # The gain's gradient needs the product before the gain; in the compute dtype, as a layer's output would be kept.
    product = None if dgain is None else y.astype(x.dtype)
    saved = None if dkernel is None else x, kernel, None if dbias is None else bias, gain, product, residuals
    y = _finish(y, gain, bias).astype(x.dtype)
    if not any_perturbed(moved):
        return y, jnp.zeros_like(y)
    backward = partial(_scaled_dot_backward, delta)
    return y, linear(partial(_scaled_dot_tangent, delta, y.shape, x.dtype), backward, saved, moved, y)


def _scaled_dot_tangent(delta, shape, dtype, saved, tangents):
    kept_x, kernel, _, gain, product, residuals = saved
    dx, dkernel, dbias, dgain, dparams = tangents
    inner = (
        None if dx is None else dot32(dx, matrix_for(kernel, dx)),
        None if kept_x is None else kernel_tangent(kept_x, dkernel),
        None if delta is None else delta.tangent(residuals, dx, dparams),
    )
    dy = added(
        *(None if term is None else term * gain for term in inner),
        None if product is None else widened(product) * dgain,
        None if dbias is None else widened(dbias.reshape(-1)),
    )
    return jnp.broadcast_to(dy.astype(dtype), shape)


def _scaled_dot_backward(delta, saved, dy):
    kept_x, kernel, bias_like, gain, product, residuals = saved
    dy32 = widened(dy)
    inner = (dy32 * gain).astype(dy.dtype)
    dx = dot32_nt(inner, matrix_for(kernel, inner))
    dparams = dkernel = dbias = dgain = None
    if delta is not None:
        dx_added, dparams = delta.backward(residuals, inner)
        dx = dx + dx_added
    if kept_x is not None:
        dkernel = dot32_tn(kept_x, inner).reshape(kernel.shape).astype(kernel.dtype)
    if bias_like is not None:
        dbias = jnp.sum(dy32, axis=0).reshape(bias_like.shape).astype(bias_like.dtype)
    if product is not None:
        dgain = jnp.sum(dy32 * widened(product), axis=0)
    return dx.astype(dy.dtype), dkernel, dbias, dgain, dparams
