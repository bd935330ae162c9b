"""Flax's own attention, NNX and Linen, under every method, against numpy with the method's dense matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.methods.registry import adapter_class
from mora_jax.linen import adapted, load_adapter
from mora_jax.linen.update import check_config
from tests.adapters.formulas import FORMULAS
from tests.adapters.test_conformance import CASES

HEADS, WIDTH, INNER, OUT = 2, 6, 8, 5
NAMES = ("query", "key", "value", "out")
X = (0.5 * np.random.default_rng(0).normal(size=(2, 4, WIDTH))).astype(np.float32)
SAME = {"rslora", "lora_plus", "relora", "orthogonal", "olora", "rslora with magnitude"}  # the programs of others


def make():
    model = nnx.MultiHeadAttention(HEADS, WIDTH, INNER, OUT, decode=False, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for name in NAMES:
        layer = getattr(model, name)
        layer.kernel.set_value(jnp.asarray(0.4 * rng.normal(size=layer.kernel.shape), jnp.float32))
        layer.bias.set_value(jnp.asarray(0.4 * rng.normal(size=layer.bias.shape), jnp.float32))
    return model


def fill(model):
    """Random numbers on top of the adapters' start; the bases of a method stay."""
    rng = np.random.default_rng(2)
    for _, variable in sorted(nnx.to_flat_state(nnx.state(model, mj.AdapterParam)), key=lambda item: str(item[0])):
        value = np.asarray(variable.get_value())
        variable.set_value(jnp.asarray(value + 0.3 * rng.normal(size=value.shape), value.dtype))


def attention(x, layers):
    """Softmax attention head by head, `layers` of kernels `[in, out]` and biases."""
    q, k, v = (x @ layers[name][0] + layers[name][1] for name in NAMES[:3])
    size, heads = INNER // HEADS, []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].swapaxes(-1, -2) / np.sqrt(size)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[..., part])
    return np.concatenate(heads, -1) @ layers["out"][0] + layers["out"][1]


def output(model):
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state: nnx.merge(graphdef, state)(X))(state))


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name in SAME)) for name in CASES])
def test_every_method_on_attention(case, tmp_path):
    model, config = make(), CASES[case]
    base = {name: [np.float64(value[...]) for value in (layer.kernel, layer.bias)] for name, layer in layers_of(model)}
    base = {
        name: (kernel.reshape(-1, bias.size) if name != "out" else kernel.reshape(INNER, OUT), bias.reshape(-1))
        for name, (kernel, bias) in base.items()
    }
    np.testing.assert_allclose(output(model), attention(np.float64(X), base), rtol=1e-4, atol=1e-5)
    if case == "ia3 on inputs":
        config = mj.IA3Config(targets="all-linear", feedforward=("out", "query"))
    if hasattr(config, "widths"):
        config = dataclasses.replace(config, widths=(INNER, INNER))
    report = mj.attach(model, config, rngs=nnx.Rngs(1))
    assert sorted(match.path for match in report.matches) == sorted(NAMES)
    fill(model)
    y, dense = output(model), {}
    for entry in adapters_of(model):
        params = {name: np.float64(value) for name, value in entry.params.items()}
        kernel, bias = base[entry.path]
        kernel, added = FORMULAS[entry.method](kernel, bias, params, entry.config, params)
        dense[entry.path] = kernel, bias + added
    assert np.abs(y - attention(np.float64(X), base)).max() > 0.01
    np.testing.assert_allclose(y, attention(np.float64(X), dense), rtol=5e-4, atol=5e-5)

    mj.save_adapter(model, tmp_path)
    fresh = make()
    mj.load_adapter(fresh, tmp_path)
    np.testing.assert_allclose(output(fresh), y, rtol=1e-4, atol=1e-5)
    plain = {
        "params": {name: {"kernel": layer.kernel[...], "bias": layer.bias[...]} for name, layer in layers_of(make())}
    }
    if has_form_in_linen(config):
        module = nn.MultiHeadDotProductAttention(HEADS, qkv_features=INNER, out_features=OUT)
        with adapted(mj.LoRAConfig(rank=1)) as report:  # says how the kernels are matrices
            jax.eval_shape(module.init, jax.random.key(0), X)
        settings, variables = load_adapter(plain, tmp_path, report=report)
        with adapted(settings):
            np.testing.assert_allclose(jax.jit(module.apply)(variables, X), y, rtol=1e-4, atol=1e-5)
    mj.merge(model)
    np.testing.assert_allclose(output(model), y, rtol=5e-4, atol=5e-5)


def has_form_in_linen(config):
    """Whether the method has one; Linen otherwise refuses it with the reason."""
    if adapter_class(config).method in ("adalora", "relora", "remora", "lora_plus") or config.bias != "none":
        with pytest.raises(ValueError, match=r"a plain tree|Linen layers have no bias"):
            check_config(config)
        return False
    check_config(config)
    return True


def layers_of(model):
    return [(name, getattr(model, name)) for name in NAMES]
