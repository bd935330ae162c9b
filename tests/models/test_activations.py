"""The gated activation, and its own backward."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.models.block import ACTIVATIONS, gated

FUSED = np.random.default_rng(0).standard_normal((3, 2, 7)).astype(np.float32)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(activation, flat):
    def plain(fused):
        fused = fused.reshape(FUSED.shape)
        return ACTIVATIONS[activation](fused[..., 0, :]) * fused[..., 1, :]

    cotangent, given = jnp.arange(21.0).reshape(3, 7), FUSED.reshape(3, 14) if flat else FUSED
    found, pull = jax.vjp(lambda fused: gated(activation, fused, flat), given)
    expected, plain_pull = jax.vjp(plain, given)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(pull(cotangent)[0], plain_pull(cotangent)[0], rtol=1e-5, atol=1e-6)


def test_backward_keeps_its_input_alone():
    half = jnp.asarray(FUSED, jnp.bfloat16)
    result, pull = jax.vjp(lambda fused: gated("silu", fused), half)
    assert [(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(pull)] == [("bfloat16", FUSED.shape)]
    assert result.dtype == pull(result)[0].dtype == jnp.bfloat16


def test_gradients_of_gate_and_up_are_joined_as_rows():
    """A slice of joined rows is one of its parts, so that XLA need not write the whole out for who reads slices."""
    rows = jnp.ones((4, 5, 14), jnp.bfloat16)
    result, pull = jax.vjp(lambda fused: gated("silu", fused, True), rows)
    shapes = re.findall(r"\[([\d,]+)\] = (?:concatenate|pad)\[", str(jax.make_jaxpr(pull)(result)))
    assert shapes and set(shapes) == {"20,14"}
