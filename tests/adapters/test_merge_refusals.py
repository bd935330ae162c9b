"""Adapters that are not whole are not merged, and nothing is changed."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from tests.models.tiny import fill_randomly


def adapted(dropout: float = 0.0) -> nnx.Linear:
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2, dropout=dropout, targets=".*"), rngs=nnx.Rngs(1))
    return model


def test_dropout_that_is_on():
    model, x = adapted(0.3), jnp.ones((2, 6))
    fill_randomly(model)
    before = np.asarray(model.kernel[...])
    with pytest.raises(ValueError, match=r"dropout of the adapter on .* is on.*call model.eval\(\)"):
        mj.merge(model)
    np.testing.assert_array_equal(model.kernel[...], before)
    model.eval()
    expected = model(x)
    mj.merge(model)
    np.testing.assert_allclose(model(x), expected, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(value):
    model = adapted()
    model.adapter.lora_b[...] = model.adapter.lora_b[...].at[1, 2].set(value)
    with pytest.raises(ValueError, match="values in lora_b that are no finite numbers"):
        mj.merge(model)
    assert np.isfinite(model.kernel[...]).all()


def test_shapes_without_values():
    model = nnx.eval_shape(lambda: nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    mj.attach(model, mj.LoRAConfig(rank=2, targets=".*"), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="the model has shapes without values"):
        mj.merge(model)
