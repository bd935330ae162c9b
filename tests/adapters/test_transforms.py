"""Adapted layers under what people put around them: `nnx.tabulate`, forward mode, remat, vmap, abstract models."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.adapter import Adapter
from tests.adapters.test_attach import IDS, Model, fill
from tests.adapters.test_conformance import CASES

EMBEDDED = mj.LoRAConfig(rank=2, use_dora=True, dropout=0.25, targets=("embed", "first", "query", "einsum"))


def subclasses(kind):
    for one in kind.__subclasses__():
        yield one
        yield from subclasses(one)


def test_tabulate_leaves_every_method_as_it_was():
    """`nnx.tabulate` sets every function of a class anew, and a static method would come back as a plain function."""
    model = Model(nnx.Rngs(0))
    mj.attach(model, EMBEDDED, rngs=nnx.Rngs(1))
    table = nnx.tabulate(model, IDS, console_kwargs={"width": 200})
    rows = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    shown = {row for row in rows if row and row[0].isalpha() and not row.startswith("attention")}
    layers = {"embed", "embed/attend", "blocks/0", "blocks/1", "einsum", "norm"}
    dropouts = {"blocks/1/adapter_dropout", "einsum/adapter_dropout"}
    assert shown == layers | dropouts, "layers, and nothing of what goes on in them"
    for kind in subclasses(Adapter):
        static = [n for n in dir(kind) if isinstance(inspect.getattr_static(kind, n), staticmethod) and n[0] != "_"]
        assert not static, f"{kind.__name__}.{static} would not survive nnx.tabulate"


@pytest.mark.parametrize("name", CASES)
def test_all_methods_work_after_tabulate(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    mj.attach(layer, CASES[name], rngs=nnx.Rngs(1))
    layer = fill(layer)
    expected = layer(x)
    nnx.tabulate(layer, x)
    np.testing.assert_array_equal(layer(x), expected)
    mj.merge(layer)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    mj.attach(layer, CASES[name], rngs=nnx.Rngs(1))
