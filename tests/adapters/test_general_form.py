"""Transforms of inputs and kernels on layers that keep their own product, with dropout, and taken out again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mora_jax as mj
from mora_jax.adapters.base import Adapter, AdapterParam
from mora_jax.adapters.config import CommonConfig
from mora_jax.adapters.matrices import product_of
from mora_jax.adapters.products.around import around
from mora_jax.adapters.products.matmul import dot
from tests.adapters.formulas import FORMULAS

CONFIGS = {
    "ia3 on inputs": mj.IA3Config(targets=".*", feedforward=("",)),
    "hira": mj.HiRAConfig(rank=2, targets=".*"),
    "oft": mj.OFTConfig(3, targets=".*"),
}
LAYERS = {
    "linear": lambda **o: nnx.Linear(6, 8, **o),
    "own product": lambda **o: nnx.Linear(6, 8, precision="highest", **o),
    "general": lambda **o: nnx.LinearGeneral((2, 3), (4, 2), axis=(-2, -1), **o),
    "einsum": lambda **o: nnx.Einsum("...td,ndh->...thn", (4, 6, 2), (2, 4), **o),
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapted(layer, config):
    mj.attach(layer, config, rngs=nnx.Rngs(1))
    for i, (_, node) in enumerate(nnx.iter_graph(layer)):
        if isinstance(node, mj.AdapterParam):
            node.set_value(node.get_value() + 0.3 * draw(*node.shape, seed=i))
    return layer


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("name", LAYERS)
def test_merging_is_the_forward_and_unmerging_gives_every_bit_back(name, case):
    layer = LAYERS[name](rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1.0))
    x = draw(5, *((2, 3) if name == "general" else (6,)), seed=7)
    kernel, plain = np.asarray(layer.kernel[...]), np.asarray(layer(x))
    y = np.asarray(adapted(layer, CONFIGS[case])(x))
    assert np.abs(y - plain).max() > 0.05
    merged = mj.merge(layer)
    np.testing.assert_allclose(layer(x), y, rtol=1e-5, atol=1e-5)
    mj.unmerge(layer, merged)
    np.testing.assert_array_equal(layer.kernel[...], kernel)
    np.testing.assert_array_equal(layer(x), y)


@pytest.mark.parametrize("axes", [(-1, -2), (2, 1), (-2, -1)])
def test_axes_in_any_order_are_those_of_the_kernel(axes):
    """Flax contracts them in ascending order, whichever way round `axis` has them."""
    x, kernel, a, b = draw(5, 2, 3, seed=1), draw(2, 3, 4, seed=2), draw(6, 2, seed=3), draw(2, 4, seed=4)
    changed = kernel + (a @ b).reshape(2, 3, 4)
    expected = sum(x[:, i, j, None] * changed[i, j] for i in range(2) for j in range(3))
    layer = nnx.LinearGeneral((2, 3), 4, axis=axes, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(kernel)
    mj.attach(layer, mj.LoRAConfig(rank=2, alpha=2.0), rngs=1)
    layer.adapter.lora_a[...], layer.adapter.lora_b[...] = jnp.asarray(a), jnp.asarray(b)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
    linen = nn.DenseGeneral(4, axis=axes, use_bias=False)
    with mj.linen.adapted(mj.LoRAConfig(rank=2, alpha=2.0)):
        y = linen.apply({"params": {"kernel": kernel}, "adapters": {"lora_a": a, "lora_b": b}}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "own product"])
def test_dropout_acts_on_the_change_of_the_kernel_alone(name):
    config = mj.HiRAConfig(rank=2, dropout=0.5, targets=".*")
    layer, x = adapted(LAYERS[name](rngs=nnx.Rngs(0)), config), draw(5, 6, seed=7)
    dropped = np.float64(nnx.clone(layer).adapter_dropout(jnp.asarray(x)))
    assert 0 < (dropped == 0).sum() < x.size
    base = np.float64(layer.kernel[...])
    params = {name: np.float64(value) for name, value in layer.adapter.params().items()}
    changed, _ = FORMULAS["hira"](base, None, params, config, params)
    np.testing.assert_allclose(layer(x), x @ base + dropped @ (changed - base), rtol=1e-4, atol=1e-5)


def test_embeddings_are_refused_by_name():
    with pytest.raises(ValueError, match="hira"):
        mj.attach(nnx.Embed(5, 6, rngs=nnx.Rngs(0)), CONFIGS["hira"], rngs=nnx.Rngs(1))


class Everything(Adapter):
    """All that the general form has, at once."""

    method = "everything"
    transforms_kernel = True

    @classmethod
    def transform_input(cls, config, params, x):
        return jnp.roll(x, 1, axis=-1) * params["gain"].astype(x.dtype)

    @classmethod
    def transform_kernel(cls, config, params, kernel):
        return jnp.tanh(kernel)

    @classmethod
    def delta(cls, config, out_features, x, params, product=dot):
        return product(x, params["m"])

    @classmethod
    def dense(cls, config, in_features, out_features, params):
        return params["m"]

    @classmethod
    def output_gain(cls, config, params, kernel):
        return params["out"] + jnp.max(kernel(), axis=0)


@pytest.mark.parametrize("name", ["linear", "own product"])
def test_all_parts_at_once(name):
    """Against the formula, in the product's own form, around a layer's call, and merged."""
    layer, x = LAYERS[name](rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1.0)), draw(5, 6, seed=7)
    adapter = Everything(6, 8, CommonConfig)
    values = {"gain": draw(6, seed=1), "m": draw(6, 8, seed=2), "out": draw(8, seed=3)}
    for key, value in values.items():
        setattr(adapter, key, AdapterParam(jnp.asarray(value)))
    kernel, bias = np.float64(layer.kernel[...]), np.float64(layer.bias[...])
    gain = values["out"] + kernel.max(axis=0)
    merged = np.zeros((6, 8))
    for i in range(6):  # input i goes to place i + 1
        merged[i] = (np.tanh(kernel) + values["m"])[(i + 1) % 6] * values["gain"][(i + 1) % 6] * gain
    np.testing.assert_allclose(adapter.merged(layer.kernel[...]), merged, rtol=1e-4, atol=1e-5)
    own = Everything, CommonConfig, adapter.params(), product_of(layer, x)
    call = functools.partial(nnx.Linear.__call__, layer)
    y = around(*own, call, x, layer.kernel[...], layer.bias[...])
    np.testing.assert_allclose(y, x @ merged + bias, rtol=1e-3, atol=1e-4)
    mj.adapters.layers.to_adapted_class(layer)
    layer.put_adapter(adapter, None)
    np.testing.assert_allclose(layer(x), x @ merged + bias, rtol=1e-3, atol=1e-4)
    graphdef, adapters, frozen = mj.partition(layer)

    def total(adapters, x):
        return jnp.sum(nnx.merge(graphdef, adapters, frozen)(x) ** 2)

    gradient, dx = jax.grad(total, (0, 1))(adapters, x)
    np.testing.assert_allclose(dx, 2 * (x @ merged + bias) @ merged.T, rtol=1e-3, atol=1e-2)
    found = {path[-1]: value.get_value() for path, value in nnx.to_flat_state(gradient)}
    for key in values:
        assert float(jnp.abs(found[key]).min()) > 0
