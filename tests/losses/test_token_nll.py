"""The chunked loss of each token, with its derivatives, against whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.losses.token_nll import token_nll
from tests.losses.test_cross_entropy import CASES

ROWS, LENGTH, WIDTH, VOCAB = 4, 13, 8, 37


def case(seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden, base = rng.normal(size=(2, ROWS, LENGTH, WIDTH)).astype(np.float32)
    kernel, base_kernel = rng.normal(size=(2, VOCAB, WIDTH)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH))
    counted = (rng.random((ROWS, LENGTH)) > 0.4).astype(np.float32)
    # What comes back for each token is of either sign.
    scale = rng.normal(size=(ROWS, LENGTH)).astype(np.float32)
    return hidden, base, kernel, base_kernel, targets, counted, scale


def dense(hidden, kernel, targets, counted, softcap=None):
    logits = jnp.einsum("btd,vd->btv", hidden, kernel)
    log_p = jax.nn.log_softmax(logits if softcap is None else softcap * jnp.tanh(logits / softcap))
    return -counted * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], log_p


@pytest.mark.parametrize(("softcap", "shards", "chunk"), CASES)
def test_values_and_gradients(softcap, shards, chunk):
    hidden, base, kernel, base_kernel, targets, counted, scale = case()

    def ours(hidden, kernel):
        options = {"base": (base, base_kernel), "softcap": softcap, "shards": shards, "chunk": chunk}
        found = token_nll(hidden, kernel, targets, counted, **options)
        return jnp.sum(scale * jnp.sin(found.nll)), found

    def plain(hidden, kernel):
        return jnp.sum(scale * jnp.sin(dense(hidden, kernel, targets, counted, softcap)[0]))

    (_, found), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, kernel)
    nll, log_p = dense(hidden, kernel, targets, counted, softcap)
    base_nll, log_q = dense(base, base_kernel, targets, counted, softcap)
    np.testing.assert_allclose(found.nll, nll, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.base_nll, base_nll, rtol=1e-5, atol=1e-6)
    kl = counted * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, jax.grad(plain, (0, 1))(hidden, kernel), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    alone = jax.grad(lambda hidden: ours(hidden, kernel)[0])(hidden)  # a head that is frozen
    np.testing.assert_allclose(alone, gradients[0], rtol=1e-5, atol=1e-6)


def test_the_base_gets_no_gradient():
    hidden, base, kernel, base_kernel, targets, counted, _ = case()

    def total(base, base_kernel):
        found = token_nll(hidden, kernel, targets, counted, base=(base, base_kernel))
        return jnp.sum(found.nll) + jnp.sum(found.base_nll) + jnp.sum(found.kl)

    assert all(not np.any(gradient) for gradient in jax.grad(total, (0, 1))(base, base_kernel))


def test_what_is_not_counted_is_not_looked_at():
    hidden, _, kernel, _, targets, counted, _ = case()
    hidden[0, 0], counted[0, 0] = np.inf, 0
    value, gradient = jax.value_and_grad(lambda hidden: jnp.sum(token_nll(hidden, kernel, targets, counted).nll))(
        hidden
    )
    assert np.isfinite(value) and np.isfinite(gradient).all() and not np.any(gradient[0, 0])


def test_half_precision_keeps_its_dtype():
    hidden, _, kernel, _, targets, counted, scale = case()
    hidden, kernel = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    gradient = jax.grad(lambda hidden: jnp.sum(scale * token_nll(hidden, kernel, targets, counted).nll))(hidden)
    assert gradient.dtype == jnp.bfloat16
    full = [array.astype(jnp.float32) for array in (hidden, kernel)]
    expected = jax.grad(lambda hidden: jnp.sum(scale * dense(hidden, full[1], targets, counted)[0]))(full[0])
    error = np.abs(gradient.astype(jnp.float32) - expected).max()
    assert error < 0.02 * np.abs(expected).max()


def test_logits_of_the_whole_batch_never_exist():
    hidden, kernel = jnp.zeros((2, 512, 8)), jnp.zeros((5000, 8))
    targets, counted = jnp.zeros((2, 512), jnp.int32), jnp.ones((2, 512))

    def total(hidden, base):
        return jnp.sum(token_nll(hidden, kernel, targets, counted, base=(base, kernel), chunk=32).nll)

    compiled = jax.jit(jax.grad(total)).lower(hidden, hidden).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 5000 * 4 / 4
