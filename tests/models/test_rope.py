"""Rotary tables. That the variants agree with transformers is checked in test_families."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.models.rope import Rope, inverse_frequencies, rotate, tables, yarn_attention_factor


def test_plain_frequencies():
    np.testing.assert_allclose(inverse_frequencies(Rope(100.0), 4), [1.0, 0.1], rtol=1e-6)
    np.testing.assert_allclose(inverse_frequencies(Rope(100.0, "linear", factor=4.0), 4), [0.25, 0.025], rtol=1e-6)


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    rope = Rope(500_000.0, "llama3", factor=8.0, original_positions=8192)
    ratio = inverse_frequencies(rope, 128) / inverse_frequencies(Rope(500_000.0), 128)
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(1 / 8)
    assert (np.diff(ratio) <= 1e-6).all()


def test_llama3_by_its_wavelengths():
    """Waves shorter than 8192 / 4 positions are kept, longer than 8192 divided by 8, between them interpolated."""
    found = inverse_frequencies(Rope(500_000.0, "llama3", factor=8.0, original_positions=8192), 128)
    for j, value in enumerate(found):
        plain = 500_000.0 ** (-2 * j / 128)
        turns = 8192 * plain / (2 * np.pi)
        share = 1.0 if turns > 4 else 0.0 if turns < 1 else (turns - 1) / 3
        assert value == pytest.approx(share * plain + (1 - share) * plain / 8, rel=1e-5)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_by_its_rotations(truncate):
    """Peng et al., 2023, section 3.2, with the ramp over dimensions of its code: 32 rotations and more are kept, one
    and fewer divided by the factor."""
    size, theta, factor, trained = 64, 10_000.0, 4.0, 2048
    rope = Rope(theta, "yarn", factor=factor, original_positions=trained, truncate=truncate)

    def dimension(rotations):  # where trained / wavelength is this number
        return size / 2 * np.log(trained / (2 * np.pi * rotations)) / np.log(theta)

    low, high = dimension(32), dimension(1)
    if truncate:
        low, high = np.floor(low), np.ceil(high)
    for j, value in enumerate(inverse_frequencies(rope, size)):
        plain = theta ** (-2 * j / size)
        divided = min(max((j - low) / (high - low), 0.0), 1.0)
        assert value == pytest.approx(plain * (1 - divided) + plain / factor * divided, rel=1e-5)


def test_yarn_attention_factor():
    assert yarn_attention_factor(1.0) == 1.0
    assert yarn_attention_factor(4.0) == pytest.approx(0.1 * np.log(4.0) + 1.0)
    assert yarn_attention_factor(4.0, 1.0, 1.0) == pytest.approx(1.0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="even head_dim, got 5"):
        inverse_frequencies(Rope(100.0), 5)
    with pytest.raises(ValueError, match="unknown rotary kind 'spiral'"):
        inverse_frequencies(Rope(100.0, "spiral"), 4)


def test_rotation_of_pairs():
    cos, sin = tables((Rope(100.0), Rope(1e4, attention_factor=2.0)), 4, jnp.array([[0, 3]]))
    assert cos.shape == (2, 1, 2, 2)
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 4)).astype(np.float32)
    y = np.asarray(rotate(jnp.asarray(x), cos[0], sin[0]))
    np.testing.assert_allclose(y[:, 0], x[:, 0], atol=1e-6)
    complex_x = x[0, 1, :, :2] + 1j * x[0, 1, :, 2:]
    complex_y = complex_x * np.exp(1j * 3 * np.array([1.0, 0.1]))
    np.testing.assert_allclose(y[0, 1], np.concatenate([complex_y.real, complex_y.imag], -1), atol=1e-5)
    np.testing.assert_allclose(rotate(jnp.asarray(x), cos[1], sin[1])[:, 0], 2 * x[:, 0], rtol=1e-6)


def test_the_backward_turns_back():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 4)), jnp.float32)
    cos, sin = (table[0] for table in tables((Rope(100.0),), 4, jnp.array([[0, 1, 2], [5, 6, 7]])))
    _, pull = jax.vjp(lambda x: rotate(x, cos, sin), x)
    np.testing.assert_allclose(pull(rotate(x, cos, sin))[0], x, atol=1e-6)
    assert {leaf.shape for leaf in jax.tree.leaves(pull)} == {cos.shape}
