"""Layers that `nnx.vmap` made: an adapter for each, under `nnx.scan` and `nnx.vmap`, merged, saved and loaded.

The oracle is the same model with its layers in a list, each with the slice of the stack that belongs to it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from tests.adapters.test_attach import fill
from tests.adapters.test_conformance import CASES

DEPTH, WIDTH = 3, 6
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, WIDTH)), jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, 8, rngs=rngs)
        self.out = nnx.Einsum("...d,hd->...h", (WIDTH, 8), (WIDTH,), rngs=rngs)
        for layer in (self.up, self.out):
            layer.bias[...] = jax.random.normal(rngs.params(), layer.bias.shape)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.out(jnp.tanh(self.up(self.norm(x)))))


class Scanned(nnx.Module):
    """Blocks made by `nnx.vmap`, run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=DEPTH)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        self.blocks = make(rngs)
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return self.head(run(self.blocks, x))


class Listed(nnx.Module):
    """The same blocks, in a list."""

    def __init__(self, scanned: Scanned):
        graphdef, state = nnx.split(scanned.blocks)
        slices = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(DEPTH)]
        self.blocks = nnx.List([nnx.merge(graphdef, one) for one in slices])
        self.head = nnx.clone(scanned.head)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model, x):
    return jnp.sum(jnp.sin(model(x)))


@pytest.mark.parametrize(
    "name", ["lora with biases", "dora", "pissa", "mora rotation", "vera", "adalora", "ia3 on inputs"]
)
def test_each_layer_of_a_stack_has_its_adapter(name, tmp_path):
    config = CASES[name]
    model = Scanned(nnx.Rngs(0))
    plain = Listed(model)
    expected = nnx.clone(plain)(X)
    report = mj.attach(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(X), expected, atol=1e-5, err_msg="a fresh adapter changes nothing")
    layers = {match.path: match.layers for match in report.matches}
    assert layers == {"blocks.*.out": DEPTH, "blocks.*.up": DEPTH, "head": 1}

    model = fill(model)
    listed = Listed(model)
    adapted = nnx.jit(lambda model, x: model(x))(model, X)
    assert not np.allclose(adapted, expected, atol=1e-2)
    np.testing.assert_allclose(adapted, listed(X), atol=1e-5)
    assert [entry.path for entry in adapters_of(model)].count("blocks.1.up") == 1
    assert report.trainable == sum(leaf.size for leaf in jax.tree.leaves(mj.partition(listed)[1]))
    _gradients_agree(model, listed)

    mj.save_adapter(model, tmp_path / "adapter")
    again = Scanned(nnx.Rngs(0))
    mj.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(again(X), adapted, atol=1e-4)
    merged = mj.merge(model)
    assert type(model.blocks.up) is nnx.Linear
    np.testing.assert_allclose(model(X), adapted, atol=1e-4)
    mj.unmerge(model, merged)
    np.testing.assert_allclose(model(X), adapted, atol=1e-4)


def _gradients_agree(model, listed):
    """Under `nnx.scan` as in the list, for every trained array."""

    def gradients(model):
        graphdef, adapters, frozen = mj.partition(model)
        found = jax.jit(jax.grad(lambda adapters: loss(nnx.merge(graphdef, adapters, frozen, copy=True), X)))(adapters)
        return dict(nnx.to_flat_state(found))

    stacked, single = gradients(model), gradients(listed)
    for (first, *path), value in stacked.items():
        if first != "blocks":
            np.testing.assert_allclose(value[...], single[(first, *path)][...], rtol=1e-4, atol=1e-4)
            continue
        for i in range(DEPTH):
            np.testing.assert_allclose(value[...][i], single[("blocks", i, *path)][...], rtol=1e-4, atol=1e-4)
