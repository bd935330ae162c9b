"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """Divides by the root mean square of the last axis and multiplies by a weight, computed in float32.

    Attributes:
        weight: float32 `[num_layers, size]`, or `[size]` when `num_layers` is None.
        path: HuggingFace module path, with `{layer}` in it for a stacked norm.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        offset: float,
        path: str,
        axis: str = "embed",
        num_layers: int | None = None,
    ):
        """Makes the identity: a weight that is 1 after `offset` has been added."""
        shape: tuple[int, ...] = (size,) if num_layers is None else (num_layers, size)
        axes = (axis,) if num_layers is None else ("layers", axis)
        self.weight = nnx.Param(jnp.full(shape, 1.0 - offset, dtype=jnp.float32), axes=axes)
        self.eps = eps
        self.offset = offset
        self.path = path

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x [..., size]` with an unstacked weight; the result has the dtype of `x`."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32) + self.offset
        return (wide * inverse * weight).astype(x.dtype)
