"""The public functions for a step of one's own, against loops in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax import losses
from mora_jax.losses.kl import weighted_kl
from mora_jax.losses.token_nll import token_nll, token_scores

RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(0, 11, (3, 7))
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]])
ANSWERS = np.array([[0, 0, 1, 1, 0, 1, 0], [0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 1]], bool)
LOGITS = RANDOM.normal(size=(3, 7, 11))


def by_loops(mode, prompt_weight):
    """Loss and divisor: every token that something predicts, at its weight."""
    total = divisor = 0.0
    for row in range(3):
        for t in range(6):
            if SEGMENTS[row, t + 1] == 0 or SEGMENTS[row, t + 1] != SEGMENTS[row, t]:
                continue
            weight = 1.0 if ANSWERS[row, t + 1] or mode == "unmasked" else 0.0 if mode == "masked" else prompt_weight
            powers = [math.exp(z) for z in LOGITS[row, t]]
            total += weight * (math.log(sum(powers)) - LOGITS[row, t, IDS[row, t + 1]])
            divisor += weight
    return total / divisor, divisor


def batch(mode, prompt_weight=0.25, **how):
    weights = losses.token_weights(ANSWERS, jnp.asarray(SEGMENTS), mode=mode, prompt_weight=prompt_weight)
    targets, weights = losses.next_token_targets(jnp.asarray(IDS), weights, jnp.asarray(SEGMENTS))
    return targets, *losses.normalized(weights, **how)


@pytest.mark.parametrize("mode", ["masked", "unmasked", "weighted"])
def test_of_logits_and_of_hidden_states(mode):
    targets, weights, divisor = batch(mode)
    expected, total = by_loops(mode, 0.25)
    assert float(divisor) == pytest.approx(total)
    ours = losses.weighted_loss_of_logits(jnp.asarray(LOGITS), targets, weights)
    assert float(ours) == pytest.approx(expected, rel=1e-5)
    # With the unit matrix as the head, hidden states are the logits.
    hidden = jnp.asarray(LOGITS, jnp.float32)
    assert float(losses.weighted_loss(hidden, jnp.eye(11), targets, weights)) == pytest.approx(expected, rel=1e-5)
    one, other = (
        jax.grad(function)(hidden)
        for function in (
            lambda h: losses.weighted_loss(h, jnp.eye(11), targets, weights),
            lambda z: losses.weighted_loss_of_logits(z, targets, weights),
        )
    )
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_every_loss_of_logits_is_that_of_hidden_states_and_the_unit_matrix():
    targets, weights, _ = batch("masked")
    hidden, base = (jnp.asarray(RANDOM.normal(size=LOGITS.shape), jnp.float32) for _ in range(2))
    unit = jnp.eye(11)

    def by_token(hidden, kernel):
        return token_nll(hidden, kernel, targets, weights, base=(base, kernel), softcap=2.0)

    sums = {
        "loss": lambda hidden, kernel: losses.weighted_loss(hidden, kernel, targets, weights),
        "kl": lambda hidden, kernel: weighted_kl(hidden, base, kernel, weights, chunk=4),
        "nll": lambda hidden, kernel: jnp.sum(weights * by_token(hidden, kernel).nll),
    }
    for name, function in sums.items():
        value, slope = jax.value_and_grad(function)(hidden, None)
        expected, other = jax.value_and_grad(function)(hidden, unit)
        assert float(value) == pytest.approx(float(expected), rel=1e-5), name
        np.testing.assert_allclose(slope, other, atol=1e-6, err_msg=name)
    scores, others = (token_scores(hidden, kernel, targets, weights) for kernel in (None, unit))
    np.testing.assert_allclose(scores.nll, others.nll, atol=1e-6)
    assert jnp.array_equal(scores.correct, others.correct) and scores.correct.any()
    # Of padding a user's logits may be anything, and the chunk with it gets no gradient from there.
    wild = jnp.where((weights > 0)[..., None], hidden, jnp.nan)
    assert np.isfinite(jax.grad(sums["loss"])(wild, None)).all()


def test_nothing_to_train_on_and_infinite_logits_beside_it():
    targets, weights, _ = batch("masked")
    zero, total = losses.normalized(jnp.zeros_like(weights))
    assert float(total) == 0.0 and not np.any(zero)
    wild = jnp.where((weights > 0)[..., None], LOGITS, jnp.inf)
    value, slope = jax.value_and_grad(losses.weighted_loss_of_logits)(wild, targets, weights)
    assert float(value) == pytest.approx(by_loops("masked", 0)[0], rel=1e-5) and np.isfinite(slope).all()
    assert float(losses.weighted_loss_of_logits(wild, targets, zero)) == 0.0


def test_over_devices_and_by_counts():
    weights = jnp.asarray(RANDOM.random((2, 3)), jnp.float32)
    both, totals = jax.vmap(lambda row: losses.normalized(row, axis_name="devices"), axis_name="devices")(weights)
    np.testing.assert_allclose(both, weights / np.asarray(weights).sum(), rtol=1e-6)
    assert totals[0] == totals[1]
    rows, count = losses.normalized(weights, counts=jnp.ones(2))
    assert float(count) == 2.0
    np.testing.assert_allclose(rows, weights / 2)


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="mode must be one of masked, unmasked, weighted, not 'last'"):
        losses.token_weights(ANSWERS, mode="last")
