"""`attach` while a function is traced (`nnx.jit`, `nnx.eval_shape`) and on models of shapes alone."""

import jax
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from tests.adapters.test_conformance import CASES
from tests.models.tiny import fill_randomly

TWO_RANKS = mj.LoRAConfig(rank=2, rank_pattern={"blocks.1.up": 3}, layers_to_transform=(1, 2), use_dora=True)
NAMES = ["lora", "mora rotation", "dora", "pissa", "vera", "ia3", "bitfit"]


class Model(nnx.Module):
    """Layers of a stack, an einsum, and a norm, which no adapter takes."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> nnx.Module:
            return nnx.Dict(up=nnx.Linear(6, 6, rngs=rngs))

        self.blocks = make(rngs)
        self.out = nnx.Einsum("...d,hd->...h", (4, 6), (4,), rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)


def made(config):
    model = Model(nnx.Rngs(0))
    return model, mj.attach(model, config, rngs=nnx.Rngs(1))


def arrays(model):
    return dict(nnx.to_flat_state(nnx.state(model)))


def shapes(model):
    return {path: (type(v), v.get_value().shape, v.get_value().dtype) for path, v in arrays(model).items()}


@pytest.mark.parametrize("config", [*(CASES[name] for name in NAMES), TWO_RANKS], ids=[*NAMES, "ranks"])
def test_traced_as_outside(config):
    model, report = made(config)
    reports = []

    def build():
        model, report = made(config)
        reports.append(report)
        return model

    compiled, abstract = nnx.jit(build)(), nnx.eval_shape(build)
    bare = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    reports.append(mj.attach(bare, config, rngs=nnx.Rngs(1)))
    assert reports == [report] * 3
    assert str(reports[1]) == str(report)
    expected = arrays(model)
    for path, variable in arrays(compiled).items():
        np.testing.assert_allclose(variable[...], expected[path][...], atol=1e-5, err_msg=str(path))
    assert shapes(compiled) == shapes(abstract) == shapes(bare) == shapes(model)
    assert all(isinstance(v.get_value(), jax.ShapeDtypeStruct) for v in arrays(abstract).values())
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((nnx.state(bare), report)))


def test_full_fine_tuning_and_modules_to_save_without_values():
    for config in (mj.FullConfig(), mj.LoRAConfig(rank=2, targets=("up",), bias="all", modules_to_save=("out",))):
        model, report = made(config)
        bare = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
        assert mj.attach(bare, config, rngs=nnx.Rngs(1)) == report
        assert shapes(bare) == shapes(model)


def test_models_put_together_inside():
    """A layer of a model that `jax.jit` gets in parts, or that is copied inside `nnx.jit`, changes its class there."""
    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    plain = nnx.clone(layer)
    mj.attach(layer, CASES["dora"], rngs=1)
    graphdef, state = nnx.split(plain)

    def attached(state):
        model = nnx.merge(graphdef, state)
        mj.attach(model, CASES["dora"], rngs=1)
        return nnx.state(model)

    @nnx.jit
    def copied(model):
        model = nnx.clone(model)
        mj.attach(model, CASES["dora"], rngs=1)
        return model

    for found in (jax.jit(attached)(state), nnx.state(copied(plain))):
        jax.tree.map(np.testing.assert_allclose, jax.tree.leaves(found), jax.tree.leaves(nnx.state(layer)))
    assert type(plain) is nnx.Linear
    assert jax.eval_shape(attached, state) == jax.eval_shape(lambda: nnx.state(layer))


def test_a_second_adapter_beside_traced_ones():
    """Scalings that come into a function as arguments have no values in it, and count as in use."""
    model, _ = made(mj.LoRAConfig(rank=2, targets=("up",)))
    graphdef, state = nnx.split(model)

    def attached(state):
        model = nnx.merge(graphdef, state)
        report = mj.attach(model, mj.MoRAConfig(rank=2, targets=("out",)), rngs=1)
        assert [match.layers for match in report.matches] == [3, 1]
        return nnx.state(model)

    jax.eval_shape(attached, state)


class Turned(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.weight = nnx.Param(nnx.initializers.normal()(rngs.params(), (4, 6)))
        self.equation = "...i,oi->...o"

    def __call__(self, x):
        return jax.numpy.einsum(self.equation, x, self.weight[...])


mj.register_layer(Turned, example=Turned(nnx.Rngs(0)), kernel="weight", einsum="...i,oi->...o")


def test_registered_layers_while_a_function_is_traced():
    def build():
        model = Turned(nnx.Rngs(0))
        assert mj.attach(model, CASES["dora"], rngs=1).matches
        return model

    compiled = nnx.jit(build)()
    for a, b in zip(jax.tree.leaves(nnx.state(compiled)), jax.tree.leaves(nnx.state(build())), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    bare = nnx.eval_shape(lambda: Turned(nnx.Rngs(0)))
    mj.attach(bare, CASES["dora"], rngs=1)
    assert bare.adapter.magnitude.shape == (4,)


def test_merged_while_a_function_is_traced():
    """Weights may be arguments of the function or not; a model from outside is refused, and stays as it is."""
    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    mj.attach(model, mj.LoRAConfig(rank=2), rngs=1)
    fill_randomly(model)
    graphdef, state = nnx.split(model)
    x = jax.random.normal(jax.random.key(0), (3, 6))

    def merged(state, copied=True):
        copy = nnx.merge(graphdef, state, copy=copied)
        mj.merge(copy)
        assert type(copy.layers[0]) is nnx.Linear
        return copy(x)

    for y in (jax.jit(merged)(state), jax.jit(lambda: merged(state))()):
        np.testing.assert_allclose(y, model(x), rtol=1e-5, atol=1e-5)
    for outside in (lambda: merged(state, copied=False), lambda: mj.merge(model)):
        with pytest.raises(ValueError, match="made outside the function that jax traces"):
            jax.jit(outside)()
    np.testing.assert_array_equal(model(x), nnx.merge(graphdef, state)(x))
    assert mj.merge(model)
