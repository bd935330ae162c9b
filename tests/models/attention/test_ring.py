"""Attention in tiles, on one device and around a ring, against scores of whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.models.attention import causal as module
from mora_jax.models.attention.causal import attention
from mora_jax.models.attention.ring import Ring
from mora_jax.training.sharding.mesh import make_mesh

ROWS, LENGTH, GROUPS, QUERIES, SIZE = 2, 48, 2, 3, 8
#: Two segments and padding at the end; padding at the start.
SEGMENTS = np.ones((ROWS, LENGTH), np.int32)
SEGMENTS[0, 20:] = 2
SEGMENTS[0, 40:] = 0
SEGMENTS[1, :3] = 0
SCALE = 0.3


def arrays() -> tuple[np.ndarray, ...]:
    """Queries, keys, values and a derivative by the output."""
    draws = np.random.default_rng(0)
    shape = (ROWS, LENGTH, GROUPS, QUERIES, SIZE)
    return tuple(
        draws.standard_normal(s).astype(np.float32) for s in (shape, (*shape[:3], SIZE), (*shape[:3], SIZE), shape)
    )


def dense(query, key, value, window, softcap):
    """The definition, `[T, T]` at once."""
    scores = jnp.einsum("btgnh,bsgh->bgnts", query, key) * SCALE
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    back = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = (back >= 0) & (back < (window or LENGTH))
    seen = seen & (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS[:, :, None] > 0)
    seen = seen[:, None, None]
    powers = jnp.where(seen, jnp.exp(jnp.where(seen, scores, 0.0)), 0.0)
    weights = powers / jnp.maximum(powers.sum(-1, keepdims=True), 1e-30)
    return jnp.einsum("bgnts,bsgh->btgnh", weights, value)


@functools.partial(jax.jit, static_argnums=(2, 3))
def dense_and_slopes(inputs, slope, window, softcap):
    """The definition and what it gives for the derivative by the output."""
    out, pull_back = jax.vjp(lambda *arrays: dense(*arrays, window, softcap), *inputs)
    return out, pull_back(slope)


def fold(x, size: int):
    """`[B, T, …]` → `[size · B, T / size, …]`."""
    x = x.reshape(x.shape[0], size, -1, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(-1, *x.shape[2:])


@pytest.mark.parametrize(
    ("size", "tile", "window", "softcap", "traced"),
    [(4, 4, 7, 5.0, True), (2, 512, None, None, False), (4, 512, 15, None, False), (1, 20, None, None, False)],
)
def test_values_and_slopes_are_those_of_whole_rows(monkeypatch, size, tile, window, softcap, traced):
    monkeypatch.setattr(module, "TILE", tile)
    monkeypatch.setattr(module, "LONG", 0)
    ring = Ring(make_mesh(1, 1, 1, size), ("context", "data"), None, "context", tile) if size > 1 else None
    *inputs, slope = arrays()
    given = jnp.asarray(window) if traced else window

    def ours(query, key, value):
        q, k, v, segments = (fold(x, size) for x in (query, key, value, SEGMENTS))
        return attention(
            q, k, v, q_segments=segments, kv_segments=segments, window=given, scale=SCALE, softcap=softcap, kernel=ring
        )

    @jax.jit
    def both(inputs, slope):
        out, attend_vjp = jax.vjp(ours, *inputs)
        return out, attend_vjp(fold(slope, size))

    out, grads = both(inputs, slope)
    expected, slopes = dense_and_slopes(inputs, slope, window, softcap)
    np.testing.assert_allclose(out, fold(expected, size), atol=5e-6)
    for found, right in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5)
