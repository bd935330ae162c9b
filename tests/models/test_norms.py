"""Normalisation, and its own backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.models.norms import Norm, rms_norm

DRAWS = np.random.default_rng(0)
X = DRAWS.standard_normal((3, 5, 8)).astype(np.float32)
WEIGHT = DRAWS.standard_normal(8).astype(np.float32)


def plain(x, weight):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * weight


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_weights_count_from_the_offset(offset):
    norm = Norm(8, eps=1e-3, offset=offset, path="norm")
    np.testing.assert_allclose(norm(X), plain(X, 1.0), rtol=1e-5)
    norm.weight[...] = jnp.asarray(WEIGHT)
    np.testing.assert_allclose(norm(X), plain(X, WEIGHT + offset), rtol=1e-5, atol=1e-6)
    assert norm(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
def test_gradients_are_those_of_autodiff(argnums):
    cotangent = jnp.asarray(DRAWS.standard_normal(X.shape), jnp.float32)
    found = jax.grad(lambda x, w: jnp.sum(cotangent * rms_norm(1e-3, x, w)), argnums)(X, WEIGHT)
    expected = jax.grad(lambda x, w: jnp.sum(cotangent * plain(x, w)), argnums)(X, WEIGHT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_backward_keeps_the_input_and_one_number_a_row():
    half = jnp.asarray(X, jnp.bfloat16)
    _, pull = jax.vjp(lambda x: rms_norm(1e-3, x, jnp.asarray(WEIGHT)), half)
    kept = sorted((leaf.dtype.name, leaf.size) for leaf in jax.tree.leaves(pull))
    assert kept == [("bfloat16", X.size), ("float32", 8), ("float32", 15)]
    assert pull(half)[0].dtype == jnp.bfloat16
