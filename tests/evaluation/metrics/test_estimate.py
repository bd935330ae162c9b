"""Values and standard errors against loops and drawn samples."""

import math

import numpy as np
import pytest

from mora_jax.evaluation.metrics.classification import F1
from mora_jax.evaluation.metrics.estimate import Mean, OfSums, Ratio, compare, mcnemar

X, Y = ([int(digit) for digit in text] for text in ("1101011011", "1001001010"))


def records(name, values):
    return [{"row": row, "id": "x", name: value} for row, value in enumerate(values)]


def test_a_mean():
    found = Mean("acc")(records("acc", X))
    assert found.value == pytest.approx(0.7)
    assert found.stderr == pytest.approx(0.1528, abs=1e-4)
    assert Mean("acc")(records("acc", [1])) == (1.0, None, 1)


def test_ratios_of_sums():
    rows = [{"nll": s, "tokens": w} for s, w in zip([1.5, 1, 4, 2], [2, 4, 5, 4], strict=True)]
    plain = Ratio("nll", "nll", "tokens")(rows)
    assert plain.value == pytest.approx(8.5 / 15)
    assert plain.stderr == pytest.approx(0.137083, abs=1e-6)
    perplexity = Ratio("p", "nll", "tokens", "exp")(rows)
    assert perplexity.value == pytest.approx(math.exp(8.5 / 15))
    assert perplexity.stderr == pytest.approx(perplexity.value * plain.stderr)
    assert Ratio("b", "nll", "tokens", "bits")(rows).value == pytest.approx(8.5 / 15 / math.log(2))
    text = {"nll": 9.0, "words": 3, "bytes": 12}  # "The cat sat."
    assert Ratio("w", "nll", "words", "exp")([text]).value == pytest.approx(20.085537, abs=1e-6)
    assert Ratio("b", "nll", "bytes", "exp")([text]).value == pytest.approx(2.117, abs=1e-6)
    assert Ratio("b", "nll", "bytes", "bits")([text]).value == pytest.approx(1.082021, abs=1e-6)
    assert Ratio("p", "nll", None, "exp")([{"nll": 1e6}]).value < math.inf


def test_standard_errors_are_those_of_drawing_again():
    random = np.random.default_rng(0)
    weights = random.integers(1, 9, (3000, 60))
    sums = weights * random.gamma(2.0, 0.5, weights.shape)

    def values(metric):
        drawn = [[{"s": s, "w": w} for s, w in zip(*pair, strict=True)] for pair in zip(sums, weights, strict=True)]
        found = [metric(rows) for rows in drawn[:300]]
        return np.std([one.value for one in found]), np.mean([one.stderr for one in found])

    of_sums = OfSums("r", lambda record: [record["s"], record["w"]], lambda total: total[0] / total[1])
    drawn, estimated = values(Ratio("r", "s", "w"))
    assert estimated == pytest.approx(drawn, rel=0.12)
    rows = [{"s": s, "w": w} for s, w in zip(sums[0], weights[0], strict=True)]
    assert of_sums(rows).stderr == pytest.approx(Ratio("r", "s", "w")(rows).stderr, rel=0.12)
    assert of_sums(rows) == of_sums(rows), "the seed is fixed"
    assert of_sums(rows[:1]).stderr is None


def test_two_models_in_pairs():
    first = records("acc", X)
    second = records("acc", Y)[::-1]  # another order
    found = compare([Mean("acc")], first, second)["acc"]
    assert (found.value, found.other, found.difference) == pytest.approx((0.7, 0.4, 0.3))
    assert found.stderr == pytest.approx(0.1528, abs=1e-4)
    reach = 2.262157 * found.stderr  # Student's t at 9 degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.3 - reach, 0.3 + reach), abs=1e-5)
    assert found.p_value == 0.25 == mcnemar(X, Y)
    assert mcnemar([1, 0], [0, 1]) == 1.0 == mcnemar([1], [1])
    kinds = [dict(row, choices=["n", "y"], answer=x, prediction=y) for row, x, y in zip(first, X, Y, strict=True)]
    same = compare([F1[0], Ratio("r", "row", "answer")], kinds, kinds)
    for one in same.values():
        assert (one.difference, one.stderr, one.p_value) == (0, pytest.approx(0), None)


def test_only_the_same_examples_compare():
    from mora_jax.errors import InputError

    with pytest.raises(InputError, match=r"other examples \(10 and 9, 9 of them in both\)"):
        compare([Mean("acc")], records("acc", X), records("acc", X)[:9])
    with pytest.raises(InputError, match="lack 'f1', which f1 is made of"):
        compare([Mean("f1")], records("acc", X), records("acc", X))
