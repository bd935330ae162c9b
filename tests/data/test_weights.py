"""The table from segment to weight, and the first token's weight."""

from __future__ import annotations

import numpy as np
import pytest

from mora_jax.data import MODES, Segment, token_weights, weight_table
from mora_jax.errors import InputError

S = Segment


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("masked", {S.ASSISTANT: 1, S.END_OF_TURN: 1}),
        ("unmasked", {S.ASSISTANT: 1, S.END_OF_TURN: 1, S.SYSTEM: 1, S.USER: 1, S.TOOL: 1}),
        ("full", {S.ASSISTANT: 1, S.END_OF_TURN: 1, S.SYSTEM: 1, S.USER: 1, S.TOOL: 1, S.TEMPLATE: 1}),
        ("weighted", {S.ASSISTANT: 1, S.END_OF_TURN: 1, S.SYSTEM: 0.25, S.USER: 0.25, S.TOOL: 0.25}),
    ],
)
def test_table(mode, weights):
    assert weight_table(mode, 0.25) == {segment: weights.get(segment, 0) for segment in Segment}


@pytest.mark.parametrize("mode", MODES)
def test_first_token_is_never_predicted(mode):
    weights = token_weights(np.full(3, S.ASSISTANT), mode)
    np.testing.assert_array_equal(weights, [0, 1, 1])
    assert weights.dtype == np.float32


def test_no_tokens():
    assert token_weights(np.zeros(0, np.int8)).shape == (0,)


def test_weighted_at_its_ends_is_masked_and_unmasked():
    assert weight_table("weighted", 0.0) == weight_table("masked")
    assert weight_table("weighted", 1.0) == weight_table("unmasked")


@pytest.mark.parametrize("weight", [-0.1, 1.01, float("nan")])
def test_prompt_weight_outside_its_range(weight):
    with pytest.raises(InputError, match=r"prompt_weight .* \[0, 1\]"):
        weight_table("weighted", weight)


def test_unknown_mode_names_the_known_ones():
    with pytest.raises(InputError, match="'maskd'.*masked, unmasked, full, weighted"):
        weight_table("maskd")
