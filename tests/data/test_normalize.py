"""Normalisers: by hand, and the same for any split of the rows."""

from __future__ import annotations

import numpy as np
import pytest

from mora_jax.data import Segment
from mora_jax.data.loss_weights import NORMALIZERS, normalize

U, A = Segment.USER, Segment.ASSISTANT
SEGMENTS = np.array([U, U, A, A, A], np.int8)
WEIGHTS = np.array([0, 0.5, 1, 1, 0], np.float32)


@pytest.mark.parametrize(
    ("how", "weights", "count"),
    [
        ("token", [0, 0.5, 1, 1, 0], 2.5),
        ("example", [0, 0.2, 0.4, 0.4, 0], 1.0),
        ("response", [0, 0.5, 1, 1, 0], 2.0),
        ("share", [0, 0.375, 0.75, 0.75, 0], 1.875),  # three of answers, one of instructions after the first token
        ("nonzero", [0, 0.5, 1, 1, 0], 3.0),
        ("constant", [0, 0.5, 1, 1, 0], 0.0),
    ],
)
def test_by_hand(how, weights, count):
    scaled, found = normalize(WEIGHTS, SEGMENTS, 1.0, how)
    np.testing.assert_allclose(scaled, weights, rtol=1e-6)
    assert found == pytest.approx(count)
    assert scaled.dtype == np.float32
    # A row of weight 2: the sum's weights double, and the counts of what has a weight do.
    doubled, found = normalize(WEIGHTS, SEGMENTS, 2.0, how)
    np.testing.assert_allclose(doubled, 2 * np.float32(weights), rtol=1e-6)
    assert found == pytest.approx(count * (2 if how in ("token", "example", "share") else 1))


@pytest.mark.parametrize("how", NORMALIZERS)
def test_nothing_trained_counts_nothing(how):
    scaled, count = normalize(np.zeros(5, np.float32), SEGMENTS, 1.0, how)
    assert not scaled.any() and count == 0
    scaled, count = normalize(WEIGHTS, SEGMENTS, 0.0, how)
    assert not scaled.any() and count == 0


def test_weight_of_a_row():
    """A row of weight 2 counts as if it came twice."""
    nll = np.random.default_rng(0).random(5).astype(np.float32)
    other = np.array([0, 0, 1, 0, 0], np.float32)
    for how in ("token", "example", "share"):
        twice = [normalize(WEIGHTS, SEGMENTS, 1.0, how)] * 2 + [normalize(other, SEGMENTS, 1.0, how)]
        once = [normalize(WEIGHTS, SEGMENTS, 2.0, how), normalize(other, SEGMENTS, 1.0, how)]
        means = [sum((w * nll).sum() for w, _ in rows) / sum(c for _, c in rows) for rows in (twice, once)]
        assert means[0] == pytest.approx(means[1])


def test_response_is_continuous_where_the_prompts_weight_goes_to_nothing():
    nll = np.random.default_rng(0).random(5)

    def loss(weight, how):
        weights, count = normalize(np.array([0, weight, 1, 1, 1], np.float32), SEGMENTS, 1.0, how)
        return float((weights * nll).sum() / count)

    assert loss(1e-6, "response") == pytest.approx(loss(0.0, "response"), rel=1e-5)
    assert loss(1e-6, "nonzero") != pytest.approx(loss(0.0, "nonzero"), rel=0.1)
