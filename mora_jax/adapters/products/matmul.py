"""Matrix products, and the one rule by which the decoder's are differentiated.

Autodiff of a bfloat16 product with float32 accumulation gets a float32 cotangent and promotes the bfloat16 weight to
meet it, which doubles the time of a training step or worse. So the decoder's products are one function with a backward
of its own, `adapted_dot`: every operand is in the compute dtype, every sum in float32, or in float64 where the operands
are. Like the decoder's norms and attention it has no forward mode.

Layers of users' models keep their own product, and what stands beside it is plain JAX, differentiated in both modes:
`dot` has operands and result in the dtype of the layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from mora_jax.adapters.products.quantization import Quantized
from mora_jax.backend import backend, product_over_tokens

Dot = Callable[[Array, Array], Array]  # `(x [N, in], w [in, out]) → [N, out]`, products in the dtype of `x`

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


def dot(x: Array, w: Array) -> Array:
    """`x [N, in] @ w [in, out]` in the dtype of `x`, plain JAX; `w` is a float32 master."""
    return x @ w.astype(x.dtype)


def row_dot(x: Array, w: Array) -> Array:
    """`x [B, T, in]` by each row's own `w [B, in, out]`, in the dtype of `x`, plain JAX."""
    return jnp.einsum("bti,bio->bto", x, w.astype(x.dtype))


def added(*terms: Array | None) -> Array:
    """The sum of the terms that there are."""
    return sum(term for term in terms if term is not None)  # type: ignore[return-value]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransposedKernel:
    """A kernel `[in, *out]` held as `[out, in]`: so a CPU reads it fastest for products with few rows.

    Attributes:
        array: `[out, in]`.
        out_shape: the axes of `out`.
    """

    array: Array
    out_shape: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, kernel: Array) -> TransposedKernel:
        """The kernel `[in, *out]`, copied."""
        return cls(kernel.reshape(kernel.shape[0], -1).T, kernel.shape[1:])

    def dense(self) -> Array:
        """The kernel `[in, *out]`."""
        return self.array.T.reshape(-1, *self.out_shape)


Kernel = Array | Quantized | TransposedKernel


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

    def single(self, index: int) -> FusedLayout:
        """The layout of one part by itself."""
        return FusedLayout((self.part_features(index),), 0, (self.part_features(index),), self.sharded)

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

    def join_tokens(self, parts: list[Array]) -> Array:
        """`join` of outputs: in slices, for the same reason, where no device holds a part of them."""
        if self.sharded or len(parts) == 1:
            return self.join(parts)
        groups = int(np.prod(self.out_shape[: self.part_axis]))
        slices = zip(*(jnp.split(part, groups, axis=-1) for part in parts), strict=True)
        return jnp.concatenate(list(itertools.chain(*slices)), axis=-1)


class Delta(Protocol):
    """What an adapter adds to a frozen product, as a pair of pure functions; hashable, since it is static under jit."""

    def forward(self, x: Array, params: Any) -> tuple[Array, Any]:
        """`x [N, in]` → (float32 `[N, out]`, residuals)."""
        ...

    def backward(self, residuals: Any, dy: Array) -> tuple[Array, Any]:
        """`dy [N, out]` in the compute dtype → (float32 `[N, in]`, gradients shaped like `params`, None for none)."""
        ...


def base_product(x: Array, kernel: Kernel) -> Array:
    """`x @ kernel` in the dtype of `x`, float32 `[N, out]`."""
    if isinstance(kernel, TransposedKernel):
        return dot32_nt(x, kernel.array.astype(x.dtype))
    return dot32(x, matrix_for(kernel, x))


def matrix_for(kernel: Kernel, x: Array) -> Array:
    """The kernel as a matrix `[in, out]` for a product with `x`, in its dtype."""
    if isinstance(kernel, TransposedKernel):
        kernel = kernel.dense()
    if isinstance(kernel, Quantized):
        kernel = kernel.after(x)
    return kernel.reshape(kernel.shape[0], -1).astype(x.dtype)


def decoder_dot(x: Array, w: Array) -> Array:
    """`x [N, in] @ w [in, out]`, a float32 master used in the dtype of `x`; float32, with the backward of the rule."""
    return _product(None, x.dtype, x, w, None, None, None)


def fused_update(delta: Delta, x: Array, params: Any) -> Array:
    """`delta` of `x [N, in]` by itself, float32 `[N, out]`, with the backward of the rule."""
    return _product(delta, x.dtype, x, None, None, params, None)


def adapted_dot(
    delta: Delta | None,
    x: Array,
    kernel: Kernel,
    bias: Array | None,
    params: Any,
    gain: Array | None = None,
    update: Array | None = None,
) -> Array:
    """One adapted projection, `gain ⊙ (x @ kernel + delta(x) + update) + bias`.

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
        gain: float32 `[out]`, or None.
        update: float32 `[N, out]`, what is added to the product besides; or None.

    Returns:
        `[N, out]` in the dtype of `x`.
    """
    y = _product(delta, x.dtype, x, kernel, gain, params, update)
    return (y if bias is None else y + widened(bias.reshape(-1))).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(delta, dtype, x, kernel, gain, params, update) -> Array:
    """The rule: float32 `[N, out]`. `dtype` is that of `x`; the kernel may be None where there is a delta."""
    y, _ = _sum(delta, x, kernel, params, update)
    return y if gain is None else y * gain


def _sum(delta, x, kernel, params, update) -> tuple[Array, Any]:
    """What the gain multiplies, and what the delta keeps for its backward."""
    given, residuals = (None, None) if delta is None else delta.forward(x, params)
    return added(None if kernel is None else base_product(x, kernel), given, update), residuals


def _product_fwd(delta, dtype, *operands):
    x, kernel, gain, params, update = primals(operands)
    y, residuals = _sum(delta, x, kernel, params, update)
    # Residuals are the arguments themselves, not reshaped or cast: whoever runs the backward may have them still. The
    # gain's gradient needs the product before the gain; in the compute dtype, as a layer's output would be kept.
    kept_x = x if differentiated(operands[1]) else None
    before_gain = y.astype(dtype) if differentiated(operands[2]) else None
    saved = kept_x, kernel, gain, before_gain, residuals, None if update is None else ()
    return (y if gain is None else y * gain), saved


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def primals(operands: Any) -> Any:
    """The values of operands, as the forward rule of a `custom_vjp` with symbolic zeros gets them."""
    return jax.tree.map(lambda leaf: leaf.value, operands, is_leaf=_is_primal)


def differentiated(operand: Any) -> bool:
    """Whether anything differentiates with respect to such an operand."""
    return any(leaf.perturbed for leaf in jax.tree.leaves(operand, is_leaf=_is_primal))


def _product_bwd(delta, dtype, saved, dy):
    kept_x, kernel, gain, before_gain, residuals, updated = saved
    if isinstance(dy, SymbolicZero):
        return None, None, None, None, None
    dupdate = dy if gain is None else dy * gain
    inner = dupdate.astype(dtype)
    dx, dparams = (None, None) if delta is None else delta.backward(residuals, inner)
    dx = added(None if kernel is None else dot32_nt(inner, matrix_for(kernel, inner)), dx)
    dkernel = None if kept_x is None else dot32_tn(kept_x, inner).reshape(kernel.shape).astype(kernel.dtype)
    dgain = None if before_gain is None else jnp.sum(dy * widened(before_gain), axis=0)
    return dx.astype(dtype), dkernel, dgain, dparams, None if updated is None else dupdate


_product.defvjp(_product_fwd, _product_bwd, symbolic_zeros=True)
