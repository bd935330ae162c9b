"""Checks of generated answers, on cases worked out by hand."""

from itertools import combinations

import pytest

from mora_jax.evaluation.metrics.answers import (
    gsm8k_flexible,
    gsm8k_strict,
    gsm8k_truth,
    pass_at_k,
    plain_number,
    squad_exact_match,
    squad_f1,
    squad_normalise,
)


@pytest.mark.parametrize(
    "answer, truths, expected",
    [
        ("The Eiffel Tower, Paris", ["Eiffel tower"], 0.8),
        ("cat cat dog", ["cat dog dog"], 2 / 3),
        ("New-York", ["New York"], 0),
        ("", [""], 0),
        ("the", ["a"], 0),
        ("one two", ["x", "one", "one two three"], 0.8),
        ("x", [], 0),
    ],
)
def test_f1(answer, truths, expected):
    assert squad_f1(answer, truths) == pytest.approx(expected)


def test_exact_match_and_its_normalisation():
    assert squad_normalise(" The  New-York, a\tTHEATRE! ") == "newyork theatre"
    assert squad_exact_match("The cat.", ["dog", "cat"]) == 1
    assert squad_exact_match("cats", ["dog", "cat"]) == 0
    assert squad_f1("", [""], empty_is_correct=True) == 1


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("She has 3+4 = 7.\n#### 7", "7", "7"),
        ("The answer is 1,234 dollars.", None, "1234"),
        ("So it is $18.", None, "18"),
        ("#### -5 because 2 > 1", "-5", "1"),
        ("#### 1,000.", "1000", "1000"),
        ("none", None, None),
    ],
)
def test_numbers_of_answers(text, strict, flexible):
    assert (gsm8k_strict(text), gsm8k_flexible(text)) == (strict, flexible)


def test_the_stated_number():
    assert gsm8k_truth("It is 3 * 4 = <<3*4=12>>12.\n#### 1,012") == "1012"
    assert gsm8k_truth("12") == plain_number(" $12. ") == "12"


@pytest.mark.parametrize("samples, correct", [(5, 2), (5, 0), (6, 6), (7, 3)])
def test_pass_at_k_equals_counting_all_draws(samples, correct):
    for k in range(1, samples + 1):
        draws = list(combinations(range(samples), k))
        expected = sum(any(number < correct for number in draw) for draw in draws) / len(draws)
        assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)
    assert pass_at_k(10, 3, 5) == pytest.approx(0.916667, abs=1e-6)


@pytest.mark.parametrize("counts", [(2, 1, 3), (2, 1, 0), (2, 3, 1), (2, -1, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(counts):
    with pytest.raises(ValueError, match="must be from"):
        pass_at_k(*counts)
