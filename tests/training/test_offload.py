"""What lies in the host's memory between uses: the same training, and the places that were asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mora_jax.errors import InputError
from mora_jax.training.config.load import check_together
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.state import OnHost, streamed
from tests.training.meshed import run


@pytest.fixture(scope="module")
def spread():
    return run("lora", (1, 2, 1), remat="offload", offload=True)


def moments(state) -> list[jax.Array]:
    leaves = jax.tree_util.tree_flatten_with_path(state.optimizer)[0]
    return [leaf for path, leaf in leaves if any(isinstance(key, jax.tree_util.DictKey) for key in path)]


@pytest.mark.slow
def test_the_losses_are_those_without_offload(spread):
    np.testing.assert_allclose(spread.losses, run("lora").losses, rtol=1e-5)


def test_moments_lie_in_the_hosts_memory_and_nothing_else_does(spread):
    found = moments(spread.state)
    assert len(found) == 2 * len(spread.state.adapters)
    assert {array.sharding.memory_kind for array in found} == {"pinned_host"}
    rest = [*spread.state.adapters.values(), *spread.frozen.values(), spread.state.step]
    assert {array.sharding.memory_kind for array in rest} == {"device"}


@pytest.mark.parametrize("taken", [True, False])
def test_moments_are_those_of_adam_where_the_step_is_taken(taken):
    adam = optax.scale_by_adam(mu_dtype="float32")
    made = streamed(adam)
    rng = np.random.default_rng(0)
    shapes = {"layers.a": (3, 4, 5), "layers.b": (3,), "embed.table": (7, 2)}
    first, second = ({name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()} for _ in range(2))
    state = adam.update(first, adam.init(first))[1]
    expected, new = adam.update(second, state)
    found, moments = jax.jit(made.update)(second, OnHost(*state), taken=jnp.asarray(taken))
    kept = new if taken else state
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, found, expected)
    jax.tree.map(close, tuple(moments), tuple(kept))
    assert isinstance(made.init(first), OnHost)


def test_the_whole_state_is_donated():
    """Outputs take the place of what they replace: the state exists once."""
    plain = run("lora")
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(plain.state._replace(key=None)))
    assert plain.compiled.memory_analysis().alias_size_in_bytes >= state


def test_pmap_refuses():
    given = {"model.path": "m", "data.train": ("d",), "out": "o", "mesh.pmap": True, "optimizer.offload": True}
    with pytest.raises(InputError, match=r"optimizer.offload needs jit over a mesh; set mesh.pmap=false"):
        check_together(lay_over(Config(), [(name, value, "test") for name, value in given.items()]))
