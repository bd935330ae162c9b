"""The checks of answers."""

import pytest

from mora_jax.demo.answers import exact_match, mean_scores, word_f1


@pytest.mark.parametrize(
    "answer, truth, expected",
    [
        ("tree cat", "tree cat", 1.0),
        ("  tree   cat. ", "tree cat", 1.0),
        ("tree, cat", "tree cat", 0.0),
        ("Tree cat", "tree cat", 0.0),
        ("egg", "EGG", 0.0),
        ("the egg", "egg", 0.0),
        ("", "egg", 0.0),
    ],
)
def test_exact_match(answer, truth, expected):
    assert exact_match(answer, truth) == expected


@pytest.mark.parametrize(
    "answer, truth, expected",
    [
        ("tree cat", "cat tree", 1.0),
        ("tree, cat", "tree cat", 1.0),
        ("tree", "tree cat", 2 / 3),
        ("tree tree tree", "tree cat", 0.4),  # precision 1/3, recall 1/2
        ("dog", "tree cat", 0.0),
        ("", "tree", 0.0),
    ],
)
def test_word_f1(answer, truth, expected):
    assert word_f1(answer, truth) == pytest.approx(expected)


def test_mean_scores():
    assert mean_scores(["a", "b c"], ["a", "b"]) == pytest.approx((0.5, (1 + 2 / 3) / 2))


def test_mean_scores_wants_as_many_answers_as_questions():
    with pytest.raises(ValueError):
        mean_scores(["a"], ["a", "b"])
