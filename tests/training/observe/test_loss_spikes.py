"""Spikes of the loss: found among noise, reported once, and not where there are none."""

import math

import numpy as np

from mora_jax.training.observe.observer import Spikes


def notes(losses):
    spikes = Spikes()
    return {step: said for step, loss in enumerate(losses, 1) if (said := spikes.note(step, loss))}


def test_a_spike_is_reported_once_with_its_robust_score():
    losses = 3 + 0.1 * np.random.default_rng(0).standard_normal(200)
    assert not notes(losses)
    losses[100:102] = 9.0
    losses[150] = 5.0
    found = notes(losses)
    assert list(found) == [101, 151]
    window = losses[36:100]
    median = np.median(window)
    score = (9.0 - median) / (1.4826 * np.median(np.abs(window - median)))
    assert f"{score:.1f} robust standard deviations above the median {median:.4f} of the 64 steps" in found[101]


def test_no_spike_in_a_falling_a_constant_or_a_short_course():
    assert not notes(4 * np.exp(-np.arange(300) / 50))
    assert not notes([1.0] * 50 + [1.0005] * 50)
    assert not notes([1.0] * 10 + [100.0])
    assert list(notes([1.0] * 30 + [math.nan, 2.0] + [1.0] * 30)) == [32]
    # A new level is reported when it begins and is normal later.
    assert list(notes([1.0] * 64 + [3.0] * 200 + [9.0])) == [65, 265]
