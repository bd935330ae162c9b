"""DoRA's magnitude, for any method that adds a matrix to the kernel (Liu et al., 2024, arXiv 2402.09353).

`W' = m ⊙ (W + ΔW) / ‖W + ΔW‖` (equation 5): the length of every output's column is a parameter of its own, and the
method below changes its direction. The norm is a constant to the gradient (equation 11), so a step costs no product
with the size of the kernel in the backward pass. m starts at ‖W‖, so a fresh adapter changes nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mora_jax.adapters.dense import widened

Array = jax.Array


def column_norms(kernel: Array) -> Array:
    """Lengths of the columns of `kernel [..., in, out]`, float32 `[..., out]`."""
    return jnp.sqrt(jnp.sum(jnp.square(widened(kernel)), axis=-2))


def magnitude_gain(magnitude: Array, kernel: Array, delta: Array) -> Array:
    """`m / ‖W + ΔW‖` by output, the norm detached; 1 for a column of zeros, which has no direction.

    Args:
        magnitude: `[out]`.
        kernel, delta: `[in, out]`.

    Returns:
        float32 `[out]`.
    """
    norms = jax.lax.stop_gradient(column_norms(widened(kernel) + delta))
    return jnp.where(norms > 0, magnitude / jnp.where(norms > 0, norms, 1.0), 1.0)
