"""Rows that are longer than the limit."""

from __future__ import annotations

import numpy as np
import pytest

from mora_jax.data import Segment
from mora_jax.data.examples import TRUNCATIONS, cut

S = Segment


def row(question=8, answer=4, bos=True, tail=0):
    """A row's segments and masked weights: BOS, a question, an answer and its end, then text of the template."""
    segments = [S.BOS] * bos + [S.USER] * question + [S.ASSISTANT] * answer + [S.END_OF_TURN] + [S.TEMPLATE] * tail
    weights = np.isin(segments, [S.ASSISTANT, S.END_OF_TURN]).astype(np.float32)
    weights[0] = 0
    return np.array(segments, np.int8), weights


def kept(segments, weights, limit, policy):
    """The numbers of the tokens of each example."""
    return [piece.take(np.arange(len(segments))).tolist() for piece in cut(segments, weights, limit, policy)]


@pytest.mark.parametrize("policy", TRUNCATIONS)
def test_a_row_that_fits_stays_whole(policy):
    segments, weights = row()
    assert kept(segments, weights, 14, policy) == [list(range(14))]


@pytest.mark.parametrize(
    ("policy", "limit", "expected"),
    [
        ("drop", 13, []),
        ("right", 12, [list(range(12))]),
        ("right", 9, []),  # the question alone
        ("left", 8, [[0, 7, 8, 9, 10, 11, 12, 13]]),
        ("left", 4, [[0, 11, 12, 13]]),
        ("prompt_first", 8, [[0, 7, 8, 9, 10, 11, 12, 13]]),
        # The answer does not fit: it keeps its beginning, and a token before it.
        ("prompt_first", 4, [[0, 8, 9, 10]]),
        # Pieces share a token, so that every trained token is predicted once; those without any are left out.
        ("split", 6, [[5, 6, 7, 8, 9, 10], [10, 11, 12, 13]]),
    ],
)
def test_policies(policy, limit, expected):
    assert kept(*row(), limit, policy) == expected


def test_prompt_first_drops_what_follows_the_answer_and_keeps_the_last_of_several():
    segments, weights = row(tail=3)
    assert kept(segments, weights, 10, "prompt_first") == [[0, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
    first, second = row(4, 2), row(4, 2, bos=False)
    both = np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])
    both[1][8] = 0
    assert kept(*both, 6, "prompt_first") == [[0, 10, 11, 12, 13, 14]]


def test_prompt_first_looks_at_the_answer_where_instructions_are_trained_too():
    segments, weights = row()
    weights[1:] = 1
    assert kept(segments, weights, 8, "prompt_first") == [[0, 7, 8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("policy", TRUNCATIONS)
def test_every_cut_fits_and_trains_something(policy, bos):
    random = np.random.default_rng(0)
    for _ in range(200):
        length = int(random.integers(1, 30))
        segments = random.integers(2, 9, length).astype(np.int8)
        if bos:
            segments[0] = S.BOS
        weights = (random.random(length) < 0.3).astype(np.float32)
        weights[0] = 0
        limit = int(random.integers(2, 12))
        pieces = cut(segments, weights, limit, policy)
        for piece in pieces:
            tokens = piece.take(np.arange(length))
            assert len(tokens) == piece.length <= limit
            assert (np.diff(tokens) > 0).all()
            assert piece.take(weights)[1:].any()
        if policy == "split":
            trained = [t for p in pieces for t in p.take(np.arange(length))[1:] if weights[t]]
            assert sorted(trained) == np.flatnonzero(weights).tolist()
