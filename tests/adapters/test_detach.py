"""Adapters taken off leave the model as it was before."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import detach
from mora_jax.models import init_decoder
from tests.models.tiny import LLAMA, fill_randomly, random_ids


@pytest.mark.parametrize("config", [mj.LoRAConfig(rank=2), mj.MoRAConfig(rank=2, targets=r".*layers\.1\..*_proj")])
def test_the_decoder_is_its_base_again(config):
    model, ids = init_decoder(LLAMA, nnx.Rngs(0)), random_ids(2, 9)
    before, structure = np.asarray(model(ids)), nnx.split(model)[0]
    mj.attach(model, config, rngs=nnx.Rngs(1))
    fill_randomly(model)
    assert np.abs(np.asarray(model(ids)) - before).max() > 0.01
    detach(model)
    np.testing.assert_array_equal(model(ids), before)
    assert nnx.split(model)[0] == structure


def test_layers_of_any_model_are_plain_again():
    model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 3, rngs=nnx.Rngs(1)))
    before = model(jnp.ones((2, 4)))
    mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(2))
    fill_randomly(model)
    assert np.abs(model(jnp.ones((2, 4))) - before).max() > 0.001
    detach(model)
    np.testing.assert_array_equal(model(jnp.ones((2, 4))), before)
    assert all(type(layer) is nnx.Linear for layer in model.layers)


def test_a_model_without_adapters():
    with pytest.raises(ValueError, match="no adapter to remove"):
        detach(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
