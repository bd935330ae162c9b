"""The gated delta rule against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.models import delta

ROWS, GROUPS, HEADS, SIZE, WIDTH = 2, 2, 4, 3, 5


def by_loop(query, key, value, log_decay, beta, segments, state):
    """Token by token, in float64."""
    out = np.zeros(value.shape)
    state = np.zeros((ROWS, HEADS, SIZE, WIDTH)) if state is None else state.astype(np.float64)
    for row, head in np.ndindex(ROWS, HEADS):
        held, of = state[row, head], 1
        for t in range(value.shape[1]):
            if segments[row, t] != of:
                held, of = np.zeros((SIZE, WIDTH)), segments[row, t]
            q, k = (x[row, t, head // (HEADS // GROUPS)].astype(np.float64) for x in (query, key))
            held = held * np.exp(log_decay[row, t, head])
            held = held + np.outer(k, beta[row, t, head] * (value[row, t, head] - held.T @ k))
            out[row, t, head] = held.T @ q / SIZE**0.5
        state[row, head] = held
    return out, state


def draws(length: int):
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((ROWS, length, GROUPS, SIZE)) for _ in range(2))
    query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    value = rng.standard_normal((ROWS, length, HEADS, WIDTH))
    log_decay = -rng.exponential(0.5, (ROWS, length, HEADS))
    beta = rng.uniform(0, 1, (ROWS, length, HEADS))
    return [x.astype(np.float32) for x in (query, key, value, log_decay, beta)]


@pytest.mark.parametrize("length, chunk", [(13, 4), (5, 64), (1, 4)])
@pytest.mark.parametrize("goes_on", [False, True])
def test_chunks_are_a_loop_over_tokens(length, chunk, goes_on, monkeypatch):
    monkeypatch.setattr(delta, "CHUNK", chunk)
    arrays = draws(length)
    segments = np.ones((ROWS, length), np.int32)
    if not goes_on:  # texts that end inside a chunk, at its end, and before padding
        segments[0, 3:], segments[0, 8:], segments[1, 4:], segments[1, 11:] = 2, 7, 3, 0
    state = np.random.default_rng(1).standard_normal((ROWS, HEADS, SIZE, WIDTH)).astype(np.float32) if goes_on else None
    out, end = jax.jit(delta.delta_rule)(*arrays, segments, state)
    wanted, last = by_loop(*arrays, segments, state)
    np.testing.assert_allclose(out, wanted, atol=2e-5)
    np.testing.assert_allclose(end, last, atol=2e-5)


@pytest.mark.slow
def test_gradients_are_finite_where_everything_is_forgotten():
    query, key, value, log_decay, beta = draws(7)
    segments = np.array([[1, 1, 2, 2, 2, 0, 0]] * ROWS)

    def total(*arrays):
        return jnp.sum(delta.delta_rule(*arrays, segments)[0] ** 2)

    gradients = jax.grad(total, range(5))(query, key, value, log_decay * 1e3, beta)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
