"""VeRA's factors are one pair for all layers, and PEFT's for the same seed."""

import math

import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.methods.vera import projections
from tests.peers import torch


@pytest.mark.peers
@pytest.mark.parametrize("seed", [0, 2**40 + 5])
def test_the_factors_are_those_that_torch_draws(seed):
    generator = torch.Generator(device="cpu").manual_seed(seed)
    left = torch.empty(6, 40).uniform_(-math.sqrt(6 / 40), math.sqrt(6 / 40), generator=generator)
    right = torch.empty(30, 6).uniform_(-1.0, 1.0, generator=generator)
    vera_a, vera_b = projections(6, (40, 30), seed)
    np.testing.assert_allclose(vera_a, left.T, atol=1e-7)
    np.testing.assert_allclose(vera_b, right.T, atol=1e-7)


def test_smaller_matrices_take_the_first_rows_and_columns():
    model = nnx.List([nnx.Linear(8, 5, rngs=nnx.Rngs(0)), nnx.Linear(3, 11, rngs=nnx.Rngs(1))])
    mj.attach(model, mj.VeRAConfig(rank=4, projection_prng_key=3), rngs=nnx.Rngs(0))
    vera_a, vera_b = projections(4, (8, 11), 3)
    for layer in model:
        np.testing.assert_array_equal(layer.adapter.vera_a[...], vera_a[: layer.in_features])
        np.testing.assert_array_equal(layer.adapter.vera_b[...], vera_b[:, : layer.out_features])
    other, _ = projections(4, (8, 11), 4)
    assert np.abs(vera_a - other).max() > 0.1


def test_the_vectors_alone_are_trained():
    layer = nnx.Linear(8, 5, rngs=nnx.Rngs(0))
    report = mj.attach(layer, mj.VeRAConfig(rank=6, d_initial=0.2), rngs=nnx.Rngs(1))
    assert report.trainable == 6 + 5
    np.testing.assert_allclose(layer.adapter.vera_d[...], 0.2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank must be a positive integer"),
        ({"projection_prng_key": -1}, "projection_prng_key must be an integer, at least 0, not -1"),
        ({"widths": (0, 4)}, r"widths\[0\] must be a positive integer"),
        ({"bias": "vera_only"}, "bias must be one of none, lora_only, all"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        mj.VeRAConfig(**settings)
