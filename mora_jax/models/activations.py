"""The gated activation of the MLP."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation: str, fused: jax.Array) -> jax.Array:
    """`activation(gate) · up`, computed in float32 and rounded once.

    Its own backward keeps `fused` alone; autodiff would keep three arrays of the size of the result.

    Args:
        activation: a name in `ACTIVATIONS`.
        fused: `[..., 2, M]`, gate and up.

    Returns:
        `[..., M]` in the dtype of `fused`.
    """
    gate, up = _halves(fused)
    return (ACTIVATIONS[activation](gate) * up).astype(fused.dtype)


def _halves(fused: jax.Array) -> tuple[jax.Array, jax.Array]:
    return fused[..., 0, :].astype(jnp.float32), fused[..., 1, :].astype(jnp.float32)


def _forward(activation: str, fused: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gated(activation, fused), fused


def _backward(activation: str, fused: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    gate, up = _halves(fused)
    dy = dy.astype(jnp.float32)
    active, pull = jax.vjp(ACTIVATIONS[activation], gate)
    (dgate,) = pull(dy * up)
    return (jnp.stack([dgate, dy * active], axis=-2).astype(fused.dtype),)


gated.defvjp(_forward, _backward)
