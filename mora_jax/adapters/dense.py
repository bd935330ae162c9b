"""Matrix products that stay in the compute dtype, forward and backward.

Autodiff of a bfloat16 product with float32 accumulation gets a float32 cotangent and promotes the bfloat16 weight to
meet it, which doubles the time of a training step or worse. The functions here carry their own backward: every
operand is in the compute dtype, every accumulation in float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from mora_jax.adapters.quantized import Quantized

Array = jax.Array


def dot32(x: Array, w: Array) -> Array:
    """`x [N, in] @ w [in, out]` with float32 accumulation and a float32 result."""
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def dot32_nt(x: Array, w: Array) -> Array:
    """`x [N, out] @ w [in, out].T` as float32 `[N, in]`, without a transposed copy of `w`."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def dot32_tn(x: Array, y: Array) -> Array:
    """`x [N, in].T @ y [N, out]` as float32 `[in, out]`: a contraction over tokens."""
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def trained_dot(x: Array, w: Array) -> Array:
    """`x [N, in] @ w [in, out]`, `w` a trained float32 master that is used in the dtype of `x`.

    Returns:
        float32 `[N, out]`. The gradient of `w` is float32, that of `x` has the dtype of `x`.
    """
    return dot32(x, w.astype(x.dtype))


def _trained_dot_fwd(x, w):
    return dot32(x, w.astype(x.dtype)), (x, w)


def _trained_dot_bwd(residuals, dy):
    x, w = residuals
    dy = dy.astype(x.dtype)
    return dot32_nt(dy, w.astype(x.dtype)).astype(x.dtype), dot32_tn(x, dy).astype(w.dtype)


trained_dot.defvjp(_trained_dot_fwd, _trained_dot_bwd)


@jax.custom_vjp
def row_dot(x: Array, w: Array) -> Array:
    """`x [B, T, in]` by each row's own `w [B, in, out]`: `trained_dot` row by row, float32 `[B, T, out]`."""
    return _batched(x, w.astype(x.dtype), 2, 1)


def _batched(x: Array, w: Array, left: int, right: int) -> Array:
    """Contracts axis `left` of `x` with axis `right` of `w`, row by row."""
    return lax.dot_general(x, w, (((left,), (right,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _row_dot_fwd(x, w):
    return row_dot(x, w), (x, w)


def _row_dot_bwd(residuals, dy):
    x, w = residuals
    dy = dy.astype(x.dtype)
    return _batched(dy, w.astype(x.dtype), 2, 2).astype(x.dtype), _batched(x, dy, 1, 1).astype(w.dtype)


row_dot.defvjp(_row_dot_fwd, _row_dot_bwd)


Kernel = Array | Quantized


class Delta(Protocol):
    """What an adapter adds to a frozen product, as a pair of pure functions; hashable, since it is static under jit."""

    def forward(self, x: Array, params: Any) -> tuple[Array, Any]:
        """`x [N, in]` → (float32 `[N, out]`, residuals)."""
        ...

    def backward(self, residuals: Any, dy: Array) -> tuple[Array, Any]:
        """`dy [N, out]` in the compute dtype → (float32 `[N, in]`, gradients shaped like `params`)."""
        ...


@partial(jax.custom_vjp, nondiff_argnums=(0,))
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
    y = dot32(x, matrix_for(kernel, x))
    if delta is not None:
        y = y + delta.forward(x, params)[0]
    if bias is not None:
        y = y + bias.reshape(-1).astype(jnp.float32)
    return y.astype(x.dtype)


def matrix_for(kernel: Kernel, x: Array) -> Array:
    """The kernel as a matrix `[in, out]` for a product with `x`, in its dtype."""
    if isinstance(kernel, Quantized):
        kernel = kernel.after(x)
    return kernel.reshape(kernel.shape[0], -1).astype(x.dtype)


def kernel_values(kernel: Any) -> tuple[Kernel, bool]:
    """The kernel of `custom_vjp`'s arguments with symbolic zeros, and whether anything differentiates it."""
    perturbed = any(leaf.perturbed for leaf in jax.tree.leaves(kernel))
    return jax.tree.map(lambda leaf: leaf.value, kernel), perturbed


def _adapted_dot_fwd(delta, x, kernel, bias, params):
    # With symbolic zeros each argument says whether anything differentiates it.
    kernel, trained = kernel_values(kernel)
    kept_x = x.value if trained else None
    x, params = x.value, jax.tree.map(lambda leaf: leaf.value, params)
    y = dot32(x, matrix_for(kernel, x))
    residuals = None
    if delta is not None:
        added, residuals = delta.forward(x, params)
        y = y + added
    if bias is not None:
        y = y + bias.value.reshape(-1).astype(jnp.float32)
    bias_like = bias.value if bias is not None and bias.perturbed else None
    # Residuals are the arguments themselves, not reshaped or cast: whoever runs the backward may have them still.
    return y.astype(x.dtype), (kept_x, kernel, bias_like, residuals)


def _adapted_dot_bwd(delta, saved, dy):
    kept_x, kernel, bias_like, residuals = saved
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    dx = dot32_nt(dy, matrix_for(kernel, dy))
    dparams = None
    if delta is not None:
        dx_added, dparams = delta.backward(residuals, dy)
        dx = dx + dx_added
    dkernel = dbias = None
    if kept_x is not None:
        dkernel = dot32_tn(kept_x, dy).reshape(kernel.shape).astype(kernel.dtype)
    if bias_like is not None:
        dbias = jnp.sum(dy, axis=0, dtype=jnp.float32).reshape(bias_like.shape).astype(bias_like.dtype)
    return dx.astype(dy.dtype), dkernel, dbias, dparams


adapted_dot.defvjp(_adapted_dot_fwd, _adapted_dot_bwd, symbolic_zeros=True)
