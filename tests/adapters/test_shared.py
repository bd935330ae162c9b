"""Layers that share a parameter: what one of them carries or merges leaves the others as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.methods.registry import METHODS
from tests.adapters.made import config_from
from tests.models.tiny import fill_randomly

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


class Pair(nnx.Module):
    """Two linear layers with one kernel and one bias, of which one module is used at two paths."""

    def __init__(self):
        self.one = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.two = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
        self.two.kernel, self.two.bias = self.one.kernel, self.one.bias
        self.again = nnx.List([self.one])
        self.one.bias[...] = jnp.arange(4.0)

    def __call__(self, x):
        return self.one(x), self.two(x), self.again[0](x)


class Tied(nnx.Module):
    """An embedding and a head on its table."""

    def __init__(self):
        self.embed = nnx.Embed(9, 4, rngs=nnx.Rngs(0))
        self.head = nnx.Einsum("btd,vd->btv", (9, 4), rngs=nnx.Rngs(1))
        self.head.kernel = self.embed.embedding

    def __call__(self, ids):
        return self.embed(ids), self.head(self.embed(ids))


def attached(model, config):
    mj.attach(model, config, rngs=nnx.Rngs(2))
    fill_randomly(model, scale=0.5)
    return model


CONFIGS = {name: config_from({"method": name, "rank": 2, "target_rank": 1}) for name in METHODS if name != "full"} | {
    "lora with biases": mj.LoRAConfig(rank=2, bias="lora_only"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_merging_one_of_two_leaves_the_other(name):
    model, plain = Pair(), np.asarray(Pair()(X)[1])
    attached(model, type(CONFIGS[name])(**{**vars(CONFIGS[name]), "targets": ("one",)}))
    one, two, again = map(np.asarray, model(X))
    assert np.abs(one - two).max() > 0.05 and (one == again).all()
    np.testing.assert_array_equal(two, plain)
    before = model.two.kernel
    with pytest.warns(UserWarning, match=r"one shared its (kernel|bias) with two\.(kernel|bias), which stays as"):
        merged = mj.merge(model)
    np.testing.assert_array_equal(model(X)[1], plain)
    np.testing.assert_allclose(model(X)[0], one, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(model(X)[0], model(X)[2])
    mj.unmerge(model, merged)
    assert model.one.kernel is model.two.kernel is before and model.one.bias is model.two.bias
    np.testing.assert_array_equal(model(X)[1], plain)
    np.testing.assert_allclose(model(X)[0], one, rtol=1e-4, atol=1e-4)


def test_merging_both_keeps_each_its_own():
    model = attached(Pair(), mj.LoRAConfig(rank=2))
    before = [np.asarray(y) for y in model(X)]
    assert np.abs(before[0] - before[1]).max() > 0.1
    kernel = np.asarray(model.one.kernel[...])
    with pytest.warns(UserWarning, match=r"one shared its kernel with two\.kernel"):
        merged = mj.merge(model)
    for y, expected in zip(model(X), before, strict=True):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    mj.unmerge(model, merged)
    assert model.one.kernel is model.two.kernel
    np.testing.assert_allclose(model.one.kernel[...], kernel, atol=1e-6)


@pytest.mark.parametrize("target", ["embed", "head"])
def test_a_tied_embedding(target):
    ids = np.arange(6).reshape(2, 3)
    model = attached(Tied(), mj.LoRAConfig(rank=2, targets=(target,)))
    before = [np.asarray(y) for y in model(ids)]
    with pytest.warns(UserWarning, match=f"{target} shared its"):
        mj.merge(model)
    for y, expected in zip(model(ids), before, strict=True):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_keeps_what_is_shared():
    model = Pair()
    mj.attach(model, mj.FullConfig(), rngs=nnx.Rngs(0))
    assert model.one.kernel is model.two.kernel
    _, trained, _ = mj.partition(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == 20


def test_a_parameter_that_a_model_holds_itself():
    class Model(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(9, 4, rngs=nnx.Rngs(0))
            self.tables = nnx.data({"head": self.embed.embedding})

        def __call__(self, ids):
            return self.embed(ids) @ self.tables["head"][...].T

    model, ids = attached(Model(), mj.LoRAConfig(rank=2, targets=("embed",))), np.arange(5)
    before = np.asarray(model(ids))
    with pytest.warns(UserWarning, match=r"embed shared its embedding with tables\.head"):
        mj.merge(model)
    np.testing.assert_allclose(model(ids), before, rtol=1e-4, atol=1e-5)
