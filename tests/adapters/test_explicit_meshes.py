"""Adapted layers on meshes with Explicit axes: values, gradients, and outputs that lie where the plain layer's do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import mora_jax as mj
from tests.adapters.test_attach import fill
from tests.adapters.test_conformance import CASES

X = np.random.default_rng(0).normal(size=(4, 2, 8)).astype(np.float32)
IDS = np.arange(8).reshape(4, 2)
LORA, DORA = mj.LoRAConfig(rank=2, targets=".*"), mj.LoRAConfig(rank=2, use_dora=True, targets=".*")


class Turned(nnx.Module):
    """A layer of a class that Flax does not have."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal(0.5)(rngs.params(), (6, 8)))
        self.bias = nnx.Param(jnp.arange(1.0, 7.0))
        self.equation = "...i,oi->...o"

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.kernel[...]) + self.bias[...]


mj.register_layer(Turned, example=Turned(nnx.Rngs(0)), einsum="...i,oi->...o", bias="bias")
LAYERS = {
    "linear": lambda: nnx.Linear(8, 6, rngs=nnx.Rngs(0)),
    "general": lambda: nnx.LinearGeneral(8, (2, 4), rngs=nnx.Rngs(0)),
    "einsum": lambda: nnx.Einsum("...td,dnh->...tnh", (8, 2, 3), (2, 3), rngs=nnx.Rngs(0)),
    "embed": lambda: nnx.Embed(10, 8, rngs=nnx.Rngs(0)),
    "turned": lambda: Turned(nnx.Rngs(0)),
}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def call(layer, x, attend, **placing):
    return (layer.attend if attend else layer)(x, **placing)


@pytest.mark.parametrize(
    ("kind", "config", "kernel", "inputs", "out"),
    [
        ("linear", CASES["lora"], P(None, "model"), P("data"), None),
        ("linear", CASES["lora with biases"], P("model"), P("data"), None),
        ("linear", CASES["lora"], P("model"), P("data", None, "model"), P("data", None, None)),
        ("linear", CASES["mora rotation"], P(), P("data", "model"), None),
        ("linear", CASES["dora"], P(), P("data", None, "model"), None),
        ("linear", CASES["ia3 on inputs"], P(None, "model"), P("data"), None),
        ("general", LORA, P(None, None, "model"), P("data"), None),
        ("einsum", DORA, P(None, "model"), P("data"), None),
        ("embed", LORA, P("model"), P("data"), P("data", None, None)),
        ("attend", DORA, P("model"), P("data"), None),
        ("turned", DORA, P(None, "model"), P("data"), None),
        ("linear", CASES["hira"], P("model"), P("data"), None),
        ("turned", CASES["oft"], P(None, "model"), P("data"), None),
        # A class of layer and a method that both stand above, with others.
        pytest.param("linear", CASES["mora"], P("model"), P("data"), None, marks=pytest.mark.slow),
        pytest.param("linear", CASES["pissa"], P(None, "model"), P("data"), None, marks=pytest.mark.slow),
        pytest.param("general", DORA, P(None, None, "model"), P("data"), None, marks=pytest.mark.slow),
        pytest.param("einsum", LORA, P(None, "model"), P("data"), None, marks=pytest.mark.slow),
        pytest.param("turned", LORA, P("model"), P("data"), None, marks=pytest.mark.slow),
        pytest.param("turned", CASES["ia3 on inputs"], P("model"), P("data"), None, marks=pytest.mark.slow),
        pytest.param("turned", CASES["hira"], P("model"), P("data"), None, marks=pytest.mark.slow),
        pytest.param("linear", CASES["oft"], P(None, "model"), P("data"), None, marks=pytest.mark.slow),
    ],
)
def test_as_on_one_device_and_placed_as_the_plain_layer(mesh, kind, config, kernel, inputs, out):
    attend = kind == "attend"
    make = LAYERS["embed" if attend else kind]
    x = IDS if kind == "embed" else X
    alone = make()
    mj.attach(alone, config, rngs=nnx.Rngs(1))
    alone = fill(alone)
    wrt = 0 if kind == "embed" else (0, 1)
    placing = {} if out is None else {"out_sharding": out}

    def values(layer, x, **placing):
        graphdef, adapters, frozen = mj.partition(layer)

        def run(adapters, x):
            y = call(nnx.merge(graphdef, adapters, frozen), x, attend, **placing)
            return jnp.sum(jnp.tanh(y)), y

        gradients, y = jax.jit(jax.grad(run, wrt, has_aux=True))(adapters, x)
        return y, gradients

    expected, expected_gradients = values(alone, x)
    with jax.set_mesh(mesh):
        plain = make()
        weight = "embedding" if hasattr(plain, "embedding") else "kernel"
        placed = jax.device_put(np.asarray(getattr(plain, weight)[...]), NamedSharding(mesh, kernel))
        getattr(plain, weight).set_value(placed)
        layer = nnx.clone(plain)
        mj.attach(layer, config, rngs=nnx.Rngs(1))
        nnx.update(layer, jax.tree.map(np.asarray, nnx.state(alone, mj.AdapterParam)))
        x = jax.device_put(x, NamedSharding(mesh, inputs))
        base = call(plain, x, attend, **placing)
        assert jax.typeof(call(layer, x, attend, **placing)) == jax.typeof(base), "outside of jit"
        y, gradients = values(layer, x, **placing)
        assert jax.typeof(y) == jax.typeof(base)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        mj.merge(layer)
        assert jax.typeof(getattr(layer, weight)[...]) == jax.typeof(placed), "merged weights lie where they lay"
        np.testing.assert_allclose(call(layer, x, attend, **placing), expected, atol=1e-5)


def test_dropout_draws_the_masks_of_one_device(mesh):
    def layer():
        layer = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        mj.attach(layer, mj.LoRAConfig(rank=2, dropout=0.5), rngs=nnx.Rngs(1))
        layer.adapter.lora_b[...] = jnp.ones((2, 6))
        return layer

    alone = layer()
    expected = [alone(X) for _ in range(3)]
    assert not np.allclose(expected[0], expected[1])
    with jax.set_mesh(mesh):
        there = layer()
        x = jax.device_put(X, NamedSharding(mesh, P("data", None, "model")))
        found = [there(x), there(x), nnx.jit(lambda layer, x: layer(x))(there, x)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("cls", [mj.LoRALinear, mj.MoRALinear])
def test_layers_with_adapters_of_their_own(mesh, cls):
    def values(layer, x):
        graphdef, adapters, frozen = mj.partition(fill(layer))

        def run(adapters):
            y = jnp.tanh(nnx.merge(graphdef, adapters, frozen)(x))
            return jnp.sum(y), y

        gradients, y = jax.jit(jax.grad(run, has_aux=True))(adapters)
        return y, gradients

    def make():
        return cls(8, 6, rank=2, rngs=nnx.Rngs(0), **({"alpha": 4.0} if cls is mj.LoRALinear else {}))

    expected, expected_gradients = values(make(), X)
    with jax.set_mesh(mesh):
        layer = make()
        layer.kernel.set_value(jax.device_put(layer.kernel.get_value(), NamedSharding(mesh, P(None, "model"))))
        y, gradients = values(layer, jax.device_put(X, NamedSharding(mesh, P("data"))))
    assert jax.typeof(y).sharding.spec == P("data", None, "model")
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
