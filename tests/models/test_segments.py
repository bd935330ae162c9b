"""What segments imply for their tokens, and the check on token ids."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from mora_jax.models import check_token_ids, default_positions
from mora_jax.models.segments import segment_lengths


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


# One shape, so that hypothesis' many examples compile once (and the first takes long).
@settings(deadline=None)
@given(arrays.arrays(np.int32, (3, 12), elements=st.sampled_from([0, 1, 2, 3, 7, 2**31 - 1])))
def test_against_counting(segments):
    """Any order of segments, holes and padding on either side."""
    positions, lengths = np.asarray(default_positions(segments)), np.asarray(segment_lengths(segments))
    assert positions.dtype == lengths.dtype == np.int32
    for row, ids in enumerate(segments):
        for place, number in enumerate(ids):
            assert positions[row, place] == np.sum(ids[:place] == number)
            assert lengths[row, place] == np.sum(ids == number)


@pytest.mark.parametrize("length", [0, 1])
def test_rows_of_hardly_any_length(length):
    segments = np.ones((2, length), np.int32)
    np.testing.assert_array_equal(default_positions(segments), np.zeros((2, length)))
    np.testing.assert_array_equal(segment_lengths(segments), segments)


def test_long_rows_need_no_square_of_their_length():
    """A comparison of all pairs would need 10 GB here."""
    segments = np.repeat(np.arange(1, 11, dtype=np.int32), 10_000)[None]
    np.testing.assert_array_equal(default_positions(segments)[0], np.tile(np.arange(10_000), 10))
    assert np.all(segment_lengths(segments) == 10_000)


def test_boolean_masks():
    np.testing.assert_array_equal(default_positions(np.array([[False, True, True]])), [[0, 0, 1]])


def test_token_ids():
    check_token_ids(np.array([[0, 9]]), 10)
    check_token_ids(np.zeros((0, 4), int), 10)
    for bad in (10, -1):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the embedding: ids go from 0 to 9"):
            check_token_ids(np.array([[0, bad]]), 10)
    with pytest.raises(ValueError, match="must be integers, got float64"):
        check_token_ids(np.array([[0.0]]), 10)
