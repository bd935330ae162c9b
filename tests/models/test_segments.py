"""Positions that segments imply, and the check on token ids."""

import numpy as np
import pytest

from mora_jax.models import check_token_ids, default_positions


@pytest.mark.parametrize(
    "segments, positions",
    [
        ([1, 1, 1, 2, 2, 3], [0, 1, 2, 0, 1, 0]),
        ([5, 5, 0, 0], [0, 1, None, None]),
        ([0, 0, 1, 1], [None, None, 0, 1]),
        ([1, 1, 0, 1], [0, 1, None, 2]),
        ([1, 2, 1, 2], [0, 0, 1, 1]),
    ],
)
def test_default_positions(segments, positions):
    found = np.asarray(default_positions(np.array([segments])))[0]
    assert found.dtype == np.int32
    for at, expected in enumerate(positions):
        assert expected is None or found[at] == expected


def test_token_ids():
    check_token_ids(np.array([[0, 9]]), 10)
    check_token_ids(np.zeros((0, 4), int), 10)
    for bad in (10, -1):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the embedding: ids go from 0 to 9"):
            check_token_ids(np.array([[0, bad]]), 10)
    with pytest.raises(ValueError, match="must be integers, got float64"):
        check_token_ids(np.array([[0.0]]), 10)
