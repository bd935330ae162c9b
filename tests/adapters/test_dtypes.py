"""Adapters on layers of every pair of compute and storage dtypes, and on complex ones."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.base import magnitude_gain
from mora_jax.adapters.methods.registry import METHODS
from mora_jax.adapters.sites import sites
from mora_jax.interop.adapter_values import install
from mora_jax.interop.convert import convert_to_lora, convert_to_mora
from mora_jax.interop.convert.combine import combine
from mora_jax.interop.read_adapter import values_of
from tests.adapters.formulas import FORMULAS
from tests.adapters.made import config_from

IN = 7
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32, "float64": jnp.float64}
BIAS = nnx.initializers.normal(1.0)
LAYERS = {
    "linear": lambda **o: nnx.Linear(IN, 6, bias_init=BIAS, **o),
    "general": lambda **o: nnx.LinearGeneral((IN,), (2, 3), bias_init=BIAS, **o),
    "einsum": lambda **o: nnx.Einsum("...td,ndh->...thn", (2, IN, 3), (3, 2), bias_init=BIAS, **o),
    "embed": lambda **o: nnx.Embed(IN, 6, **o),
}
CONFIGS = {
    name: config_from({"method": name, "rank": 2, "target_rank": 1, "targets": ".*", "alpha": 3.0})
    for name in METHODS
    if name not in ("full", "rslora", "olora", "lora_plus", "relora", "remora")
} | {
    "rotation": mj.MoRAConfig(rank=2, kind="rotation", targets=".*"),
    "biases": mj.LoRAConfig(rank=2, bias="lora_only", targets=".*"),
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


SOME = [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16"), ("float64", "float32")]
PAIRS = [("linear", *pair) for pair in itertools.product(DTYPES, DTYPES)]
PAIRS += [(layer, *pair) for layer in ("general", "einsum", "embed") for pair in SOME]


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "dtype", "param_dtype"), PAIRS)
def test_a_fresh_adapter_is_the_base(layer, dtype, param_dtype):
    options = {"dtype": DTYPES[dtype], "param_dtype": DTYPES[param_dtype]}
    x = jnp.arange(IN) if layer == "embed" else jnp.asarray(draw(16, IN), DTYPES[dtype])
    plain = LAYERS[layer](rngs=nnx.Rngs(0), **options)(x)
    for name in ("lora", "dora") if layer == "embed" else ("lora", "dora", "mora", "bitfit"):
        model = LAYERS[layer](rngs=nnx.Rngs(0), **options)
        mj.attach(model, CONFIGS[name], rngs=nnx.Rngs(1))
        y = model(x)
        assert y.dtype == plain.dtype
        found, expected = np.float64(y), np.float64(plain)
        if model.adapter.only_adds:
            np.testing.assert_array_equal(found, expected, err_msg=name)
            continue
        # A norm and an einsum's sums may be taken in another order: one step of the output's dtype, at its scale.
        step = float(jnp.finfo(plain.dtype).eps)
        np.testing.assert_allclose(found, expected, rtol=step, atol=4 * step * (dtype != "bfloat16"), err_msg=name)


def filled(make, config):
    model = make(rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64)
    mj.attach(model, config, rngs=nnx.Rngs(1))
    for i, (_, node) in enumerate(nnx.iter_graph(model)):
        if isinstance(node, mj.AdapterParam):
            assert node.dtype == jnp.float64
            node.set_value(node.get_value() + 0.3 * draw(*node.shape, seed=i))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_float64_stays_float64(name):
    model, x = filled(LAYERS["linear"], CONFIGS[name]), draw(5, IN)
    entry = next(adapters_of(model))
    values = {key: np.asarray(value) for key, value in entry.params.items()}
    assert all(value.dtype == np.float64 for value in values.values())
    kernel, bias = np.asarray(next(sites(model)).kernel()), np.asarray(model.bias[...])
    config = entry.config
    if name == "adalora":  # PEFT's factor, which the formula leaves out
        config = dataclasses.replace(config, alpha=config.alpha * config.rank / (config.rank + 1e-5))
    matrix, added = FORMULAS[entry.method](kernel, bias, values, config, values)
    expected = x @ matrix + bias + added
    np.testing.assert_allclose(model(x), expected, rtol=1e-12, atol=1e-12)
    graphdef, adapters, frozen = mj.partition(model)

    def total(adapters, x):
        return jnp.sum(nnx.merge(graphdef, adapters, frozen)(x) ** 2)

    gradient, dx = jax.grad(total, (0, 1))(adapters, x)
    np.testing.assert_allclose(dx, 2 * expected @ matrix.T, rtol=1e-11, atol=1e-11)
    leaves, tree = jax.tree.flatten(adapters)
    for i, slope in enumerate(jax.tree.leaves(gradient)):
        assert slope.dtype == jnp.float64
        index, ends = tuple(0 for _ in slope.shape), []
        for sign in (1, -1):
            moved = [leaf.at[index].add(sign * 1e-6) if k == i else leaf for k, leaf in enumerate(leaves)]
            ends.append(total(tree.unflatten(moved), x))
        if "magnitude" not in values or slope.ndim == 1:  # DoRA's norm is a constant to the gradient
            np.testing.assert_allclose(slope[index], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-7)
    kernel = np.asarray(model.kernel[...])
    merged = mj.merge(model)
    assert model.kernel.dtype == jnp.float64
    np.testing.assert_allclose(model(x), expected, rtol=1e-12, atol=1e-12)
    mj.unmerge(model, merged)
    np.testing.assert_allclose(model.kernel[...], kernel, rtol=1e-12, atol=1e-13)


def test_float64_of_einsums_embeddings_and_layers_made_with_an_adapter():
    for layer in ("einsum", "general"):
        model, x = filled(LAYERS[layer], CONFIGS["dora"]), draw(5, IN)
        before = np.asarray(model(x))
        mj.merge(model)
        np.testing.assert_allclose(model(x), before, rtol=1e-12, atol=1e-12)
    model = filled(LAYERS["embed"], CONFIGS["lora"])
    before = np.asarray(model(jnp.arange(IN))), np.asarray(model.attend(draw(3, 6)))
    mj.merge(model)
    np.testing.assert_allclose(model(jnp.arange(IN)), before[0], rtol=1e-12)
    np.testing.assert_allclose(model.attend(draw(3, 6)), before[1], rtol=1e-12, atol=1e-13)
    made = mj.LoRALinear(IN, 6, rank=2, alpha=3.0, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    assert made.lora_a.dtype == jnp.float64 and made.adapter.scaling[...] == 1.5
    base = nnx.Linear(IN, 6, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(made(draw(5, IN)), base(draw(5, IN)))


def test_full_fine_tuning_of_float64_has_float64_masters():
    model = LAYERS["linear"](rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    before = np.asarray(model(draw(3, IN)))
    mj.attach(model, mj.FullConfig(), rngs=nnx.Rngs(0))
    assert model.kernel.dtype == jnp.float64
    np.testing.assert_array_equal(model(draw(3, IN)), before)


@pytest.mark.parametrize(
    "config, options",
    [
        (config, {name: jnp.complex64})
        for config in (mj.LoRAConfig(targets=("turn",)), mj.BitFitConfig(targets=("turn",)), mj.FullConfig())
        for name in ("dtype", "param_dtype")
        # Full fine-tuning of a complex dtype alone has real parameters.
        if (type(config), name) != (mj.FullConfig, "dtype")
    ],
)
def test_complex_layers_are_refused_by_name(config, options):
    class Model(nnx.Module):
        def __init__(self):
            self.turn = nnx.Linear(3, 4, rngs=nnx.Rngs(0), **options)

    model = Model()
    with pytest.raises(ValueError, match=r"turn(\.\w+)? is complex64") as raised:
        mj.attach(model, config, rngs=nnx.Rngs(0))
    assert "\n" not in str(raised.value) and type(model.turn) is nnx.Linear


def test_complex_inputs_are_refused():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    with pytest.raises(
        TypeError, match="adapters have no complex form, and the input of an adapted layer is complex64"
    ):
        model(jnp.ones((2, 3), jnp.complex64))


def test_a_magnitude_that_is_the_norm_up_to_rounding_has_gain_1_and_its_gradient():
    kernel = jax.random.normal(jax.random.key(0), (300, 5), jnp.float32)
    norms = np.linalg.norm(np.asarray(kernel, np.float64), axis=0)

    def gain(magnitude):
        return magnitude_gain(magnitude, kernel, jnp.zeros_like(kernel))

    # The sums of two programs differ by so much.
    for off in (-2e-6, 3e-7, 2e-6):
        np.testing.assert_array_equal(gain(jnp.asarray(norms * (1 + off), jnp.float32)), np.ones(5))
    np.testing.assert_allclose(gain(jnp.asarray(norms * 1.0001, jnp.float32)), np.full(5, 1.0001), rtol=1e-6)
    slope = jax.grad(lambda magnitude: gain(magnitude).sum())(jnp.asarray(norms, jnp.float32))
    np.testing.assert_allclose(slope, 1 / norms, rtol=1e-5)


ODD = {
    "rslora": mj.RsLoRAConfig(rank=2, alpha=3.0, targets=".*"),
    "an endless alpha": mj.LoRAConfig(rank=2, alpha=1 / 3, targets=".*"),
}


@pytest.mark.parametrize("name", [*(name for name in CONFIGS if name != "biases"), *ODD])
def test_folders_keep_float64(tmp_path, name):
    layer = nnx.Dict(up=LAYERS["linear"](rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64))
    plain = nnx.clone(layer)
    mj.attach(layer, (CONFIGS | ODD)[name], rngs=nnx.Rngs(1))
    arrays = nnx.state(layer, mj.AdapterParam)
    nnx.update(layer, jax.tree.map(lambda array: array + 0.1 * draw(*array.shape), arrays))
    x = draw(4, IN)
    y = np.asarray(layer.up(x))
    mj.save_adapter(layer, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype.name for tensor in stored.values()} == {"float64"}
    mj.load_adapter(plain, tmp_path / "adapter")
    np.testing.assert_allclose(plain.up(x), y, rtol=1e-13, atol=1e-13)
    # Float32 layers take it too, and stay float32.
    narrow = nnx.Dict(up=LAYERS["linear"](rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32))
    kernel, bias = (layer.up.kernel[...], layer.up.bias[...])
    narrow.up.kernel[...], narrow.up.bias[...] = kernel.astype(jnp.float32), bias.astype(jnp.float32)
    mj.load_adapter(narrow, tmp_path / "adapter")
    assert narrow.up(x.astype(np.float32)).dtype == jnp.float32
    np.testing.assert_allclose(narrow.up(x.astype(np.float32)), y, rtol=1e-4, atol=1e-4)


def layer_of(name):
    """A float64 layer with an adapter of random values, and what the layer computes."""
    layer = filled(lambda **options: nnx.Dict(up=LAYERS["linear"](**options)), CONFIGS[name])
    return layer, np.asarray(layer.up(draw(4, IN)))


@pytest.mark.parametrize("name", ["lora", "pissa", "mora", "rotation", "dora", "hira", "oft"])
def test_conversions_keep_float64(name):
    layer, y = layer_of(name)
    assert convert_to_lora(layer, rank=6).error < 1e-13
    np.testing.assert_allclose(layer.up(draw(4, IN)), y, rtol=1e-12, atol=1e-12)
    if name not in ("mora", "rotation"):
        return
    layer, y = layer_of(name)
    assert convert_to_mora(layer, kind=CONFIGS[name].kind, rank=2).error < 1e-12
    np.testing.assert_allclose(layer.up(draw(4, IN)), y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "how"), [("lora", "cat"), ("lora", "svd"), ("mora", "sum")])
def test_combinations_keep_float64(name, how):
    (one, y), (other, _) = layer_of(name), layer_of(name)
    other.up.adapter.scaling.set_value(0.7 * other.up.adapter.scaling.get_value())
    x, adapters = draw(4, IN), {"one": values_of(one), "other": values_of(other)}
    mj.detach(other)
    base = np.asarray(other.up(x))
    by_path, conversion = combine(other, adapters, {"one": 0.3, "other": -1.1}, how)
    install(other, by_path)
    assert conversion.error < 1e-13
    np.testing.assert_allclose(other.up(x), base + (0.3 - 1.1 * 0.7) * (y - base), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["lora", "pissa", "mora", "rotation"])
def test_slots_keep_float64(name):
    (one, y), (other, _) = layer_of(name), layer_of(name)
    nnx.update(other, jax.tree.map(lambda array: -0.3 * array, nnx.state(other, mj.AdapterParam)))
    x, model = draw(4, IN), nnx.clone(one)
    mj.detach(model)
    named = mj.NamedAdapters(model)
    named.add("one", one)
    named.add("other", other)
    named.set_active(["one", "other", "one", "other"])
    expected = np.where([[True], [False], [True], [False]], y, other.up(x))
    np.testing.assert_allclose(model.up(x), expected, rtol=1e-12, atol=1e-12)
    named.keep("one")
    np.testing.assert_allclose(model.up(x), y, rtol=1e-12, atol=1e-12)
