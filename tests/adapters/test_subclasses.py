"""Layers of users' subclasses of Flax's layers, and Linen modules in NNX's clothes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from tests.models.tiny import fill_randomly

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


class Named(nnx.Linear):
    """Says more about itself, and computes the same."""

    def __init__(self, *args, title: str = "named", **options):
        super().__init__(*args, **options)
        self.title = title


class Gated(Named):
    """Does something after the product, with one more parameter."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gate = nnx.Param(jnp.full((6,), 0.5))

    def __call__(self, inputs, *, scale=2.0):
        return jnp.tanh(super().__call__(inputs * scale)) * self.gate[...]


class General(nnx.LinearGeneral):
    def __call__(self, inputs):
        return super().__call__(inputs) + 1.0


class Turned(nnx.Einsum):
    pass


class Own(nnx.Linear):
    """Computes the product itself, so that no adapter beside it would be seen."""

    def __call__(self, inputs):
        return inputs @ self.kernel[...] * 2.0


class Direct(nnx.Linear):
    def __call__(self, inputs):
        return nnx.Linear.__call__(self, inputs)


MAKE = {
    "named": lambda: Named(4, 6, rngs=nnx.Rngs(0)),
    "gated": lambda: Gated(4, 6, rngs=nnx.Rngs(0)),
    "general": lambda: General((4,), (2, 3), rngs=nnx.Rngs(0)),
    "turned": lambda: Turned("...d,df->...f", (4, 6), rngs=nnx.Rngs(0)),
}


class Model(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


@pytest.mark.parametrize("config", [mj.LoRAConfig(rank=2), mj.DoRAConfig(rank=2), mj.MoRAConfig(rank=2)])
@pytest.mark.parametrize("name", MAKE)
def test_a_subclass_is_adapted_and_merges(name, config):
    model = Model(MAKE[name]())
    kind, plain = type(model.layer), np.asarray(model(X))
    report = mj.attach(model, config, rngs=nnx.Rngs(1))
    assert [match.path for match in report.matches] == ["layer"] and isinstance(model.layer, kind)
    np.testing.assert_allclose(model(X), plain, atol=1e-6)
    fill_randomly(model, scale=0.4)
    tuned = np.asarray(jax.jit(lambda x: model(x))(X))
    assert np.abs(tuned - plain).max() > 0.02
    merged = mj.merge(model)
    assert type(model.layer) is kind
    np.testing.assert_allclose(model(X), tuned, rtol=1e-4, atol=1e-5)
    mj.unmerge(model, merged)
    np.testing.assert_allclose(model(X), tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Own, Direct])
def test_a_call_that_would_pass_the_adapter_by(kind):
    model = Model(kind(4, 6, rngs=nnx.Rngs(0)))
    model.other = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
    report = mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    assert [match.path for match in report.matches] == ["other"] and type(model.layer) is kind
    said = [part for part in report.skipped if "layer" in part.paths]
    assert [part.reason for part in said] == [
        "its class overrides the call of Linear and does not go on to super().__call__"
    ]
    with pytest.raises(ValueError, match=r"layer \(\w+\), which can't be adapted: its class overrides the call of"):
        mj.attach(Model(kind(4, 6, rngs=nnx.Rngs(0))), mj.LoRAConfig(targets=("layer",)), rngs=nnx.Rngs(1))


@pytest.mark.parametrize("started", [False, True])
def test_a_linen_module_in_a_bridge_is_named(started):
    layer = nnx.bridge.ToNNX(nn.Dense(3), rngs=nnx.Rngs(0))
    if started:
        layer.lazy_init(X)
    for targets in ("all-linear", ("layer",)):
        with pytest.raises(ValueError, match=r"layer .*a Linen module in nnx\.bridge\.ToNNX.*mora_jax\.linen\.adapted"):
            mj.attach(Model(layer), mj.LoRAConfig(targets=targets), rngs=nnx.Rngs(1))


@pytest.mark.parametrize("wrapper", ["WeightNorm", "SpectralNorm"])
def test_a_kernel_that_is_normalised_before_the_product_carries_none(wrapper):
    if not hasattr(nnx, wrapper):
        pytest.skip(f"this Flax has no nnx.{wrapper}")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.norm = getattr(nnx, wrapper)(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
            self.out = nnx.Linear(4, 4, rngs=rngs)

    report = mj.attach(Model(nnx.Rngs(0)), mj.LoRAConfig(rank=2), rngs=1)
    assert [match.path for match in report.matches] == ["out"]
    with pytest.raises(ValueError, match="norm.layer_instance .*WeightNorm or SpectralNorm changes its kernel"):
        mj.attach(Model(nnx.Rngs(0)), mj.LoRAConfig(rank=2, targets=["layer_instance"]), rngs=1)
