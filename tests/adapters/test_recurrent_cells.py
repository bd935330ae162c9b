"""Adapters on the products of recurrent cells, which are layers of their own: NNX and Linen, merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mora_jax as mj
import mora_jax.linen as ml

X = jax.random.normal(jax.random.key(0), (2, 4, 3))
CELLS = {"LSTMCell": "h[ifgo]|i[ifgo]_?", "OptimizedLSTMCell": "dense_[ih]", "GRUCell": "dense_[ih]"}


class Recurrent(nnx.Module):
    def __init__(self, cell):
        self.cell = cell(3, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        carry = self.cell.initialize_carry(x[:, 0].shape, rngs=nnx.Rngs(0))
        for t in range(x.shape[1]):
            carry, y = self.cell(carry, x[:, t])
        return y


@pytest.mark.parametrize("name", CELLS)
def test_nnx(name):
    model = Recurrent(getattr(nnx, name))
    before = model(X)
    report = mj.attach(model, mj.LoRAConfig(rank=2, targets=rf"cell\.({CELLS[name]})"), rngs=1)
    assert report.skipped == () and len(report.matches) == (8 if name == "LSTMCell" else 2)
    assert jnp.array_equal(model(X), before)
    graphdef, adapters, frozen = mj.partition(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf + 0.3, adapters), frozen)
    adapted = model(X)
    assert jnp.abs(adapted - before).max() > 0.1
    mj.merge(model)
    np.testing.assert_allclose(model(X), adapted, atol=1e-5)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.MGUCell])
def test_linen(cell):
    model = nn.RNN(cell(4), variable_broadcast=("params", "adapters"))
    config = mj.LoRAConfig(rank=2)
    with ml.adapted(config) as report:
        variables = model.init(jax.random.key(0), X)
        moved = variables | {"adapters": jax.tree.map(lambda leaf: leaf + 0.3, variables["adapters"])}
        adapted = model.apply(moved, X)
    assert not report.table.skipped
    plain = model.apply({"params": variables["params"]}, X)
    assert jnp.abs(adapted - plain).max() > 0.1
    params = ml.merge(moved, config, report=report)
    np.testing.assert_allclose(model.apply({"params": params}, X), adapted, atol=1e-5)


def test_a_cell_that_joins_its_products_names_the_one_that_does_not():
    model = nn.RNN(nn.OptimizedLSTMCell(4), variable_broadcast=("params", "adapters"))
    with (
        pytest.raises(ValueError, match=r"cell.hi .*nn.LSTMCell takes the same params and adapters"),
        ml.adapted(mj.LoRAConfig(rank=2, targets=["hi"])),
    ):
        model.init(jax.random.key(0), X)
    with (
        pytest.raises(ValueError, match=r"layers_0 .*can't be adapted: a transposed convolution"),
        ml.adapted(mj.LoRAConfig(rank=2, targets=["layers_0"])),
    ):
        nn.Sequential([nn.ConvTranspose(2, (3,))]).init(jax.random.key(0), X)
