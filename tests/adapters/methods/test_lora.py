"""LoRA against plain loops and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.methods import lora


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_apply_is_the_double_sum():
    x, a, b = random(0, 2, 5), random(1, 5, 3), random(2, 3, 4)
    expected = np.zeros((2, 4))
    for n in range(2):
        for o in range(4):
            for r in range(3):
                for i in range(5):
                    expected[n, o] += 0.5 * float(x[n, i]) * float(a[i, r]) * float(b[r, o])
    np.testing.assert_allclose(lora.apply(x, a, b, 0.5), expected, atol=1e-5)
    np.testing.assert_allclose(x @ np.asarray(lora.delta_weight(a, b, 0.5)), expected, atol=1e-5)


def test_init_is_kaiming_uniform_and_zero():
    lora_a, lora_b = lora.init(jax.random.key(0), 400, 7, 16)
    assert lora_a.shape == (400, 16) and lora_b.shape == (16, 7)
    bound = 1 / np.sqrt(400)
    assert np.abs(lora_a).max() <= bound
    np.testing.assert_allclose(np.std(lora_a), bound / np.sqrt(3), rtol=0.03)
    assert not np.any(lora_b)


def test_gradients_by_finite_differences():
    x, a, b, g = random(0, 6, 5), random(1, 5, 3), random(2, 3, 4), random(3, 6, 4)

    def value(x, a, b):
        return np.sum((np.float64(x) @ np.float64(a) @ np.float64(b)) * 2.0 * g)

    gradients = jax.grad(lambda *p: jnp.sum(lora.apply(*p, 2.0) * g), (0, 1, 2))(x, a, b)
    for i, gradient in enumerate(gradients):
        for index in [(0, 0), (2, 1)]:
            up, down = [x.copy(), a.copy(), b.copy()], [x.copy(), a.copy(), b.copy()]
            up[i][index] += 1e-2
            down[i][index] -= 1e-2
            numeric = (value(*up) - value(*down)) / 2e-2
            np.testing.assert_allclose(gradient[index], numeric, rtol=2e-3, atol=1e-3)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"one rank; got \(5, 3\) and \(2, 4\)"):
        lora.apply(jnp.ones((1, 5)), jnp.ones((5, 3)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="x has 6 features, lora_a takes 5"):
        lora.apply(jnp.ones((1, 6)), jnp.ones((5, 3)), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="rank must be a positive integer, not 0"):
        mj.LoRAConfig(rank=0)
    with pytest.raises(ValueError, match="dropout must be a finite number, at least 0 and below 1, not 1.0"):
        mj.LoRAConfig(dropout=1.0)
    with pytest.raises(ValueError, match="targets"):
        mj.LoRAConfig(targets=())


@pytest.mark.parametrize("make", [
    lambda **kw: mj.LoRALinear(8, 6, rank=3, alpha=6.0, rngs=nnx.Rngs(0), **kw),
    lambda **kw: mj.MoRALinear(8, 6, rank=3, kind="rotation", rngs=nnx.Rngs(0), **kw),
])  # fmt: skip
class TestLayers:
    """`LoRALinear` and `MoRALinear` used directly."""

    def filled(self, layer):
        for name, value in vars(layer.adapter).items():
            if isinstance(value, mj.AdapterParam):
                value[...] = jnp.asarray(random(len(name), *value.shape))
        return layer

    def test_fresh_layer_is_its_base(self, make):
        layer, x = make(), random(0, 4, 8)
        np.testing.assert_array_equal(layer(x), x @ layer.kernel[...] + layer.bias[...])
        assert isinstance(layer, nnx.Linear)

    def test_merge_equals_forward(self, make):
        layer, x = self.filled(make()), random(0, 4, 8)
        expected = np.asarray(layer(x))
        base = np.asarray(x @ layer.kernel[...] + layer.bias[...])
        assert np.abs(expected - base).max() > 0.1
        mj.merge(layer)
        assert type(layer) is nnx.Linear
        np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)

    def test_bfloat16_base(self, make):
        layer, x = self.filled(make(param_dtype=jnp.bfloat16)), jnp.asarray(random(0, 4, 8), jnp.bfloat16)
        y = layer(x)
        assert y.dtype == jnp.bfloat16
        _, adapters, _ = mj.partition(layer)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapters))
        mj.merge(layer)
        scale = float(jnp.abs(y).max())
        np.testing.assert_allclose(np.float32(layer(x)), np.float32(y), rtol=0, atol=scale * 2**-6)

    def test_dropout_is_on_the_adapter_path_only(self, make):
        layer, x = make(dropout=0.5), random(0, 64, 8)
        base = x @ layer.kernel[...] + layer.bias[...]
        # A fresh adapter adds nothing, so whatever dropout does must not show.
        np.testing.assert_allclose(layer(x), base, atol=1e-6)
        self.filled(layer)
        noisy = [np.asarray(layer(x)) for _ in range(2)]
        assert np.abs(noisy[0] - noisy[1]).max() > 0.01
        layer.eval()
        np.testing.assert_array_equal(layer(x), layer(x))
        many = np.repeat(x[:1], 20_000, axis=0)
        quiet = np.asarray(layer(x[:1]))
        layer.train()
        np.testing.assert_allclose(np.mean(layer(many), axis=0), quiet[0], atol=0.15 * np.abs(quiet).max())

    def test_kernel_gets_its_gradient_when_asked(self, make):
        layer, x, g = self.filled(make()), random(0, 4, 8), random(1, 4, 6)
        gradient = nnx.grad(lambda layer: jnp.sum(layer(x) * g))(layer)
        np.testing.assert_allclose(gradient["kernel"][...], x.T @ g, atol=1e-5)
        np.testing.assert_allclose(gradient["bias"][...], g.sum(0), atol=1e-5)
