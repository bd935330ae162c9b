"""VeRA's factors are one pair for all layers."""

import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.vera import projections


def test_smaller_matrices_take_the_first_rows_and_columns():
    big_a, big_b = projections(40, 30, 4, seed=3)
    small_a, small_b = projections(10, 20, 4, seed=3)
    np.testing.assert_allclose(small_a * np.sqrt(10 / 6), big_a[:10] * np.sqrt(40 / 6), rtol=1e-5)
    np.testing.assert_allclose(small_b, big_b[:, :20], rtol=1e-5)
    assert np.abs(big_a).max() <= np.sqrt(6 / 40) and np.abs(big_b).max() <= np.sqrt(6 / 4)
    other_a, _ = projections(10, 20, 4, seed=4)
    assert np.abs(np.asarray(other_a - small_a)).max() > 0.1


def test_the_vectors_alone_are_trained():
    layer = nnx.Linear(8, 5, rngs=nnx.Rngs(0))
    report = mj.attach(layer, mj.VeRAConfig(rank=6, d_initial=0.2), rngs=nnx.Rngs(1))
    assert report.trainable == 6 + 5
    np.testing.assert_allclose(layer.adapter.vera_d[...], 0.2)
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        mj.VeRAConfig(rank=0)
