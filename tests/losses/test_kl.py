"""The chunked divergence from the base against the plain formula over the whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.losses.kl import weighted_kl
from tests.losses.test_cross_entropy import CASES

ROWS, LENGTH, WIDTH, VOCAB = 4, 13, 8, 37


def case(seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    base = (hidden + 0.5 * rng.normal(size=hidden.shape)).astype(np.float32)
    kernel = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    weights = (rng.random((ROWS, LENGTH)) * (rng.random((ROWS, LENGTH)) > 0.5)).astype(np.float32)
    return hidden, base, kernel, weights


def plain(hidden, base, kernel, weights, softcap=None) -> float:
    """Token by token, in float64."""

    def log_probabilities(state):
        logits = np.array([np.dot(row, state) for row in kernel.astype(np.float64)])
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        return logits - np.log(np.sum(np.exp(logits)))

    total = 0.0
    for row in range(ROWS):
        for place in range(LENGTH):
            log_p, log_q = log_probabilities(hidden[row, place]), log_probabilities(base[row, place])
            total += float(weights[row, place]) * float(np.sum(np.exp(log_p) * (log_p - log_q)))
    return total


def dense(hidden, base, kernel, weights, softcap=None):
    """The same with whole logits, for autodiff."""

    def log_probabilities(states):
        logits = jnp.einsum("btd,vd->btv", states, kernel)
        return jax.nn.log_softmax(logits if softcap is None else softcap * jnp.tanh(logits / softcap))

    log_p, log_q = log_probabilities(hidden), log_probabilities(base)
    return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


@pytest.mark.parametrize(("softcap", "shards", "chunk"), CASES)
def test_value_and_gradient(softcap, shards, chunk):
    hidden, base, kernel, weights = case()

    def ours(hidden):
        return weighted_kl(hidden, base, kernel, weights, softcap=softcap, shards=shards, chunk=chunk)

    value, gradient = jax.jit(jax.value_and_grad(ours))(hidden)
    np.testing.assert_allclose(value, plain(hidden, base, kernel, weights, softcap), rtol=1e-5)
    np.testing.assert_allclose(ours(hidden), value, rtol=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(dense)(hidden, base, kernel, weights, softcap), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradient_against_finite_differences(softcap):
    hidden, base, kernel, weights = case(1)
    gradient = jax.grad(weighted_kl)(hidden, base, kernel, weights, softcap=softcap, chunk=6)
    step = 1e-4
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=hidden.shape)
        ahead, behind = (
            plain(hidden.astype(np.float64) + sign * step * direction, base, kernel, weights, softcap)
            for sign in (1, -1)
        )
        np.testing.assert_allclose(np.sum(gradient * direction), (ahead - behind) / (2 * step), rtol=1e-5)


def test_the_base_and_the_head_get_no_gradient():
    hidden, base, kernel, weights = case()
    gradients = jax.grad(lambda *trained: weighted_kl(hidden, *trained, weights), (0, 1))(base, kernel)
    assert all(not np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_two_heads(softcap, dropout):
    """The tuned one gets a gradient, the base's none; with dropout on the tuned head it has inputs of its own."""
    hidden, base, kernel, weights = case()
    base_kernel = kernel + 0.3 * np.random.default_rng(5).normal(size=kernel.shape).astype(np.float32)
    if dropout:
        dropped = hidden * (np.random.default_rng(6).random(hidden.shape) > 0.3) / 0.7
        hidden = np.concatenate([hidden, dropped.astype(np.float32)], axis=-1)
        kernel = np.concatenate([base_kernel, kernel - base_kernel], axis=-1)

    def ours(hidden, kernel, base_kernel):
        options = {"softcap": softcap, "shards": 2, "chunk": 5}
        return -3 * weighted_kl(hidden, base, kernel, weights, base_kernel=base_kernel, **options)

    def plainly(hidden, kernel):
        def log_probabilities(states, kernel):
            logits = jnp.einsum("btd,vd->btv", states, kernel)
            return jax.nn.log_softmax(logits if softcap is None else softcap * jnp.tanh(logits / softcap))

        log_p, log_q = log_probabilities(hidden, kernel), log_probabilities(base, base_kernel)
        return -3 * jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    value, found = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(hidden, kernel, base_kernel)
    expected, wanted = jax.value_and_grad(plainly, (0, 1))(hidden, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(found, (*wanted, 0 * base_kernel), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_no_divergence_from_itself():
    hidden, _, kernel, weights = case()
    value, gradient = jax.value_and_grad(weighted_kl)(hidden, hidden, kernel, weights, chunk=6)
    assert abs(value) < 1e-6
    assert np.abs(gradient).max() < 1e-6


def test_no_weight_gives_zero_and_finite_gradients():
    hidden, base, kernel, weights = case()
    hidden[0, 0] = base[1, 1] = np.inf  # not looked at
    value, gradient = jax.value_and_grad(weighted_kl)(hidden, base, kernel, 0 * weights, chunk=5)
    assert value == 0
    assert not np.any(gradient)


def test_half_precision_keeps_its_dtype():
    hidden, base, kernel, weights = case()
    half = [jnp.asarray(array, jnp.bfloat16) for array in (hidden, base, kernel)]
    value, gradient = jax.value_and_grad(weighted_kl)(*half, weights)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    expected, right = jax.value_and_grad(dense)(*(array.astype(jnp.float32) for array in half), weights)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(gradient.astype(jnp.float32), right, rtol=0.02, atol=0.02 * np.abs(right).max())


def test_logits_of_the_whole_batch_never_exist():
    hidden, kernel, weights = jnp.zeros((2, 512, 8)), jnp.zeros((5000, 8)), jnp.ones((2, 512))
    grad = jax.jit(jax.grad(lambda h, b: weighted_kl(h, b, kernel, weights, chunk=32)))
    compiled = grad.lower(hidden, hidden).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 5000 * 4 / 4
