"""Arrays of a run are made where they belong, and are not copied there again."""

import jax
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.training.build_step import assemble
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.sharding.mesh import make_mesh
from tests.training.meshed import SIZES

MESH = (1, 2, 2, 1)


@pytest.fixture(scope="module")
def made():
    model = Decoder(read_config(SIZES["even"], "config.json"), rngs=nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    config = lay_over(Config(), [("mesh.fsdp", 2, "test"), ("mesh.tensor", 2, "test"), ("adapter.rank", 2, "test")])
    return assemble(model, config, 4, make_mesh(*MESH))


def test_a_placed_model_is_taken_as_it_is(made):
    for arrays in (made.adapters, made.frozen):
        for name, array in made.runner.place(arrays).items():
            assert array.sharding == arrays[name].sharding, name


def test_the_state_is_that_of_one_device_in_shards(made):
    state, expected = made.placed_state(3), made.initial_state(3)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for found, right in zip(
        jax.tree.leaves(state._replace(key=0)), jax.tree.leaves(expected._replace(key=0)), strict=True
    ):
        np.testing.assert_array_equal(found, right)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert jax.tree.leaves(shardings) == jax.tree.leaves(made.runner.places(expected))
    assert not all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings.optimizer))
