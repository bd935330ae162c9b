"""Matrix products that stay in the compute dtype, forward and backward.

Autodiff of a bfloat16 product with float32 accumulation gets a float32 cotangent and promotes the bfloat16 weight to
meet it, which doubles the time of a training step or worse. The functions here carry their own backward: every
operand is in the compute dtype, every accumulation in float32, or in float64 where the operands are. Forward mode works
too, since each backward is the transpose of a tangent that is written out beside it (`tangent.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax.adapters.products.quantization import Quantized
from mora_jax.adapters.products.tangent import any_perturbed, linear, perturbed
from mora_jax.backend import backend, product_over_tokens

Array = jax.Array

FEW = 64  # columns of a product over tokens that are few: measured with 8 to 64 beside 256 to 1,536


def wide(dtype: Any) -> Any:
    """What sums of numbers of a dtype are taken in: float32, or float64 where they are that."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(array: Array) -> Array:
    """The array in `wide` of its dtype."""
    return array.astype(wide(array.dtype))


def dot32(x: Array, w: Array) -> Array:
    """`x [N, in] @ w [in, out]` with float32 accumulation and a float32 result."""
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=wide(x.dtype))


def dot32_nt(x: Array, w: Array) -> Array:
    """`x [N, out] @ w [in, out].T` as float32 `[N, in]`, without a transposed copy of `w`."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=wide(x.dtype))


def dot32_tn(x: Array, y: Array) -> Array:
    """`x [..., N, in].T @ y [..., N, out]` as float32 `[..., in, out]`: a contraction over tokens, batched."""
    if backend() == "cpu" and y.shape[-1] < min(x.shape[-1], FEW + 1):
        # XLA calls Eigen, which is fast only where the few columns come first; the barrier keeps it from turning that.
        return jnp.swapaxes(lax.optimization_barrier(product_over_tokens(y, x)), -1, -2)
    return product_over_tokens(x, y)


@jax.custom_jvp
def trained_dot(x: Array, w: Array) -> Array:
    """`x [N, in] @ w [in, out]`, `w` a trained float32 master that is used in the dtype of `x`.

    Returns:
        float32 `[N, out]`. The gradient of `w` is float32, that of `x` has the dtype of `x`.
    """
    return dot32(x, w.astype(x.dtype))


@partial(trained_dot.defjvp, symbolic_zeros=True)
def _trained_dot_jvp(primals, tangents):
    y = trained_dot(*primals)
    return y, linear(_trained_dot_tangent, _trained_dot_backward, primals, perturbed(tangents), y)


def _trained_dot_tangent(residuals, tangents):
    (x, w), (dx, dw) = residuals, tangents
    return added(
        None if dx is None else dot32(dx, w.astype(x.dtype)), None if dw is None else dot32(x, dw.astype(x.dtype))
    )


def _trained_dot_backward(residuals, dy):
    x, w = residuals
    dy = dy.astype(x.dtype)
    return dot32_nt(dy, w.astype(x.dtype)).astype(x.dtype), dot32_tn(x, dy).astype(w.dtype)


@jax.custom_jvp
def row_dot(x: Array, w: Array) -> Array:
    """`x [B, T, in]` by each row's own `w [B, in, out]`: `trained_dot` row by row, float32 `[B, T, out]`."""
    return _batched(x, w.astype(x.dtype), 2, 1)


def _batched(x: Array, w: Array, left: int, right: int) -> Array:
    """Contracts axis `left` of `x` with axis `right` of `w`, row by row."""
    return lax.dot_general(x, w, (((left,), (right,)), ((0,), (0,))), preferred_element_type=wide(x.dtype))


@partial(row_dot.defjvp, symbolic_zeros=True)
def _row_dot_jvp(primals, tangents):
    y = row_dot(*primals)
    return y, linear(_row_dot_tangent, _row_dot_backward, primals, perturbed(tangents), y)


def _row_dot_tangent(residuals, tangents):
    (x, w), (dx, dw) = residuals, tangents
    return added(None if dx is None else row_dot(dx, w), None if dw is None else row_dot(x, dw))


def _row_dot_backward(residuals, dy):
    x, w = residuals
    dy = dy.astype(x.dtype)
    return _batched(dy, w.astype(x.dtype), 2, 2).astype(x.dtype), _batched(x, dy, 1, 1).astype(w.dtype)


@jax.custom_jvp
def scale_features(x: Array, gain: Array) -> Array:
    """`x [N, in]` times a trained `gain [in]`, in the dtype of `x`; the gain's gradient is summed in float32."""
    return (widened(x) * gain).astype(x.dtype)


@partial(scale_features.defjvp, symbolic_zeros=True)
def _scale_features_jvp(primals, tangents):
    y = scale_features(*primals)
    return y, linear(_scale_features_tangent, _scale_features_backward, primals, perturbed(tangents), y)


def _scale_features_tangent(residuals, tangents):
    (x, gain), (dx, dgain) = residuals, tangents
    by_x = None if dx is None else widened(dx) * gain
    return added(by_x, None if dgain is None else widened(x) * dgain).astype(x.dtype)


def _scale_features_backward(residuals, dy):
    x, gain = residuals
    dy = widened(dy)
    return (dy * gain).astype(x.dtype), jnp.sum(dy * widened(x), axis=0)


def added(*terms: Array | None) -> Array:
    """The sum of the terms that there are."""
    return sum(term for term in terms if term is not None)  # type: ignore[return-value]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Turned:
    """A kernel `[in, *out]` held as `[out, in]`: so a CPU reads it fastest for products with few rows.

    Attributes:
        array: `[out, in]`.
        out_shape: the axes of `out`.
    """

    array: Array
    out_shape: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, kernel: Array) -> Turned:
        """The kernel `[in, *out]`, copied."""
        return cls(kernel.reshape(kernel.shape[0], -1).T, kernel.shape[1:])

    def dense(self) -> Array:
        """The kernel `[in, *out]`."""
        return self.array.T.reshape(-1, *self.out_shape)


Kernel = Array | Quantized | Turned


class Delta(Protocol):
    """What an adapter adds to a frozen product, as a pair of pure functions; hashable, since it is static under jit."""

    def forward(self, x: Array, params: Any) -> tuple[Array, Any]:
        """`x [N, in]` → (float32 `[N, out]`, residuals)."""
        ...

    def moved(self, dparams: Any) -> Any:
        """Tangents of `params` (None for what nothing differentiates) without those of its constants."""
        ...

    def tangent(self, residuals: Any, dx: Array | None, dparams: Any) -> Array | None:
        """The change of the output, float32 `[N, out]`, with `x` and `params`; None for what does not change."""
        ...

    def backward(self, residuals: Any, dy: Array) -> tuple[Array, Any]:
        """The transpose: `dy [N, out]` in the compute dtype → (float32 `[N, in]`, gradients shaped like `params`)."""
        ...


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def adapted_dot(delta: Delta | None, x: Array, kernel: Kernel, bias: Array | None, params: Any) -> Array:
    """One adapted projection, `x @ kernel + bias + delta(x)`, as one function with its own backward.

    Sums are taken in float32 and rounded once. A kernel that nothing differentiates (the usual case: it is frozen)
    costs no gradient and keeps no activation for one; a trained float32 kernel is used in the dtype of `x`. A quantised
    kernel is made dense in the dtype of `x` for each of the products, forward and backward, and kept by neither.

    Args:
        delta: the adapter's static part, or None for a plain product.
        x: `[N, in]` in the compute dtype.
        kernel: `[in, out]`, or `[in, *axes]` with the output split in axes, in the compute dtype, a float32 master, or
            quantised.
        bias: of the kernel's output shape, or None.
        params: the adapter's arrays (float32 masters), any pytree.

    Returns:
        `[N, out]` in the dtype of `x`.
    """
    y = base_product(x, kernel)
    if delta is not None:
        y = y + delta.forward(x, params)[0]
    if bias is not None:
        y = y + widened(bias.reshape(-1))
    return y.astype(x.dtype)


def base_product(x: Array, kernel: Kernel) -> Array:
    """`x @ kernel` in the dtype of `x`, float32 `[N, out]`."""
    if isinstance(kernel, Turned):
        return dot32_nt(x, kernel.array.astype(x.dtype))
    return dot32(x, matrix_for(kernel, x))


def matrix_for(kernel: Kernel, x: Array) -> Array:
    """The kernel as a matrix `[in, out]` for a product with `x`, in its dtype."""
    if isinstance(kernel, Turned):
        kernel = kernel.dense()
    if isinstance(kernel, Quantized):
        kernel = kernel.after(x)
    return kernel.reshape(kernel.shape[0], -1).astype(x.dtype)


def perturbed_product(delta: Delta | None, tangents: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tangents of a product's `(x, kernel, …, params)`, None for what nothing differentiates."""
    dx, dkernel, *others, dparams = perturbed(tangents)
    dkernel = dkernel if any_perturbed(dkernel) else None  # of a quantised kernel there would be a tree without leaves
    return dx, dkernel, *others, dparams if delta is None else delta.moved(dparams)


def kernel_tangent(x: Array, dkernel: Array | None) -> Array | None:
    """The change of a product with the change of its kernel; None for a kernel that is frozen."""
    return None if dkernel is None else dot32(x, matrix_for(dkernel, x))


@partial(adapted_dot.defjvp, symbolic_zeros=True)
def _adapted_dot_jvp(delta, primals, tangents):
    x, kernel, bias, params = primals
    moved = perturbed_product(delta, tangents)
    _, dkernel, dbias, _ = moved
    y = base_product(x, kernel)
    residuals = None
    if delta is not None:
        update, residuals = delta.forward(x, params)
        y = y + update
    if bias is not None:
        y = y + widened(bias.reshape(-1))
    # Residuals are the arguments themselves, not reshaped or cast: whoever runs the backward may have them still.
    saved = None if dkernel is None else x, kernel, None if dbias is None else bias, residuals
    y = y.astype(x.dtype)
    if not any_perturbed(moved):
        return y, jnp.zeros_like(y)
    backward = partial(_adapted_dot_backward, delta)
    return y, linear(partial(_adapted_dot_tangent, delta, y.shape, x.dtype), backward, saved, moved, y)


def _adapted_dot_tangent(delta, shape, dtype, saved, tangents):
    kept_x, kernel, _, residuals = saved
    dx, dkernel, dbias, dparams = tangents
    dy = added(
        None if dx is None else dot32(dx, matrix_for(kernel, dx)),
        None if kept_x is None else kernel_tangent(kept_x, dkernel),
        None if dbias is None else widened(dbias.reshape(-1)),
        None if delta is None else delta.tangent(residuals, dx, dparams),
    )
    return jnp.broadcast_to(dy.astype(dtype), shape)


def _adapted_dot_backward(delta, saved, dy):
    kept_x, kernel, bias_like, residuals = saved
    dx = dot32_nt(dy, matrix_for(kernel, dy))
    dparams = None
    if delta is not None:
        dx_added, dparams = delta.backward(residuals, dy)
        dx = dx + dx_added
    dkernel = dbias = None
    if kept_x is not None:
        dkernel = dot32_tn(kept_x, dy).reshape(kernel.shape).astype(kernel.dtype)
    if bias_like is not None:
        dbias = jnp.sum(dy, axis=0, dtype=wide(dy.dtype)).reshape(bias_like.shape).astype(bias_like.dtype)
    return dx.astype(dy.dtype), dkernel, dbias, dparams
