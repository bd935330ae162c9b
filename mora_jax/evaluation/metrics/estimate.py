"""Values with their standard errors, from one record an example, and two models on the same examples.

A metric reads records alone, so it can be computed again, and for two models on the same examples compared in pairs.
Standard errors are those of drawing other examples of the same kind; they say nothing of other seeds of a training.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mora_jax.errors import InputError

#: An example's values by name.
Record = Mapping[str, Any]

RESAMPLES, SEED = 2_000, 0
_AT_ONCE = 200  # resamples, which takes their number times that of the examples in memory


class Estimate(NamedTuple):
    """A value, its standard error (None for a single example), and how many examples it comes from."""

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class _ByExample:
    """A metric whose standard error is that of the mean of one number an example."""

    name: str

    def __call__(self, records: Sequence[Record]) -> Estimate:
        """The value with its standard error."""
        value, numbers = self._by_example(records)
        return Estimate(value, _stderr_of_mean(numbers), len(records))

    def difference(self, first: Sequence[Record], second: Sequence[Record]) -> Estimate:
        """The first value minus the second, from records of the same examples in the same order."""
        (one, ours), (other, theirs) = self._by_example(first), self._by_example(second)
        return Estimate(one - other, _stderr_of_mean(ours - theirs), len(first))

    def _by_example(self, records: Sequence[Record]) -> tuple[float, np.ndarray]:
        """The value, and numbers by example with its mean and its standard error."""
        raise NotImplementedError  # abstract: every metric has its own


class Mean(_ByExample):
    """The mean of one value an example; its standard error is s/√n.

    >>> Mean("acc")([{"acc": 1}, {"acc": 0}, {"acc": 1}, {"acc": 1}])
    Estimate(value=0.75, stderr=0.25, n=4)
    """

    def _by_example(self, records: Sequence[Record]) -> tuple[float, np.ndarray]:
        values = np.array([record[self.name] for record in records], float)
        return float(values.mean()), values


@dataclass(frozen=True)
class Ratio(_ByExample):
    """A sum over examples divided by another, `Σ above / Σ below`, perhaps its exponential or in bits.

    The standard error is that of a ratio of sums, `√(n/(n−1) Σ(S − r W)²) / ΣW`; that of the exponential follows from
    its derivative.

    Attributes:
        name: of the metric.
        above, below: of an example's values; `below` None counts examples.
        scale: `"plain"`, `"exp"` or `"bits"`, for a ratio in nats.
    """

    above: str
    below: str | None
    scale: str = "plain"

    def _by_example(self, records: Sequence[Record]) -> tuple[float, np.ndarray]:
        sums = np.array([record[self.above] for record in records], float)
        weights = np.array([1 if self.below is None else record[self.below] for record in records], float)
        ratio = sums.sum() / weights.sum()
        pseudo = ratio + (sums - ratio * weights) / weights.mean()
        if self.scale == "bits":
            return ratio / math.log(2), pseudo / math.log(2)
        if self.scale == "exp":
            value = math.exp(min(ratio, 700.0))  # finite
            return value, value * (1 + pseudo - ratio)
        return float(ratio), pseudo


@dataclass(frozen=True)
class OfSums:
    """A function of sums over all examples; its standard error is that of `RESAMPLES` bootstrap resamples.

    Attributes:
        name: of the metric.
        statistics: of an example, m numbers.
        value: of their sums, `[m]`.
    """

    name: str
    statistics: Callable[[Record], Sequence[float]]
    value: Callable[[np.ndarray], float]

    def __call__(self, records: Sequence[Record]) -> Estimate:
        return self._estimate([self._rows(records)])

    def difference(self, first: Sequence[Record], second: Sequence[Record]) -> Estimate:
        """The first value minus the second, of the same examples."""
        return self._estimate([self._rows(first), self._rows(second)])

    def _rows(self, records: Sequence[Record]) -> np.ndarray:
        return np.array([self.statistics(record) for record in records], float)

    def _estimate(self, rows: Sequence[np.ndarray]) -> Estimate:
        """Of the first's value, or of its difference from the second's, each resample drawing the same examples."""
        signs = (1, -1)[: len(rows)]
        values = [sign * self.value(one.sum(axis=0)) for sign, one in zip(signs, rows, strict=True)]
        count = len(rows[0])
        if count < 2:
            return Estimate(float(sum(values)), None, count)
        random, drawn = np.random.default_rng(SEED), list[float]()
        for start in range(0, RESAMPLES, _AT_ONCE):
            wanted = min(_AT_ONCE, RESAMPLES - start)
            counts = random.multinomial(count, np.full(count, 1 / count), size=wanted)
            for sums in zip(*(counts @ one for one in rows), strict=True):
                drawn.append(sum(sign * self.value(one) for sign, one in zip(signs, sums, strict=True)))
        return Estimate(float(sum(values)), float(np.std(drawn, ddof=1)), count)


def _stderr_of_mean(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


#: A value over records, which two models' records of the same examples are compared by.
Metric = Mean | Ratio | OfSums


class Comparison(NamedTuple):
    """A metric of two models.

    Attributes:
        value, other: of the first and of the second model.
        difference: the first minus the second.
        stderr: of the difference, in pairs; None for a single example.
        low, high: its 95 % interval, by Student's t with n − 1 degrees of freedom.
        p_value: where examples are right or wrong, that of McNemar's exact test; else None.
    """

    value: float
    other: float
    difference: float
    stderr: float | None
    low: float | None
    high: float | None
    p_value: float | None


def compare(metrics: Sequence[Metric], first: Sequence[Record], second: Sequence[Record]) -> dict[str, Comparison]:
    """Compares two models by the records that their evaluations left.

    Args:
        metrics: computed for both.
        first, second: records of the same examples, in any order; `row` and `id` say which example it is. One that
            either didn't score is left out.

    Raises:
        InputError: they are not of the same examples, or one lacks what a metric needs.
    """
    from scipy import stats  # type: ignore[import-untyped]  # jax needs it

    pairs = zip(first, in_order_of(first, second), strict=True)
    both = [pair for pair in pairs if all("skipped" not in record for record in pair)]
    if not both:
        raise InputError("no example is scored in both evaluations")
    first, second = map(list, zip(*both, strict=True))
    comparisons = {}
    for metric in metrics:
        try:
            value, other, difference = metric(first), metric(second), metric.difference(first, second)
        except KeyError as error:
            raise InputError(f"the records of one evaluation lack {error}, which {metric.name} is made of") from None
        low = high = None
        if difference.stderr is not None:
            reach = float(stats.t.ppf(0.975, difference.n - 1)) * difference.stderr
            low, high = difference.value - reach, difference.value + reach
        p_value = None
        if isinstance(metric, Mean):
            ours, theirs = ([record[metric.name] for record in records] for records in (first, second))
            p_value = mcnemar(ours, theirs) if {*ours, *theirs} <= {0, 1} else None
        by_model = value.value, other.value, difference.value
        comparisons[metric.name] = Comparison(*by_model, difference.stderr, low, high, p_value)
    return comparisons


def in_order_of(first: Sequence[Record], second: Sequence[Record]) -> list[Record]:
    """The second records in the order of the first.

    Raises:
        InputError: they are not of the same examples.
    """
    by_example = {_example(record): record for record in second}
    if len(first) != len(second) or any(_example(record) not in by_example for record in first):
        shared = sum(_example(record) in by_example for record in first)
        raise InputError(
            f"the two evaluations are of other examples ({len(first)} and {len(second)}, {shared} of them in both); "
            f"compare runs with the same --task, --data and --limit"
        )
    return [by_example[_example(record)] for record in first]


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """The exact two-sided p value of McNemar's test: the pairs that differ fall to either side like a coin.

    Args:
        first, second: 0 or 1 for each example.

    >>> mcnemar([1, 1, 1, 0], [0, 0, 0, 0])
    0.25
    """
    from scipy import stats

    gains = sum(one > other for one, other in zip(first, second, strict=True))
    losses = sum(one < other for one, other in zip(first, second, strict=True))
    return min(1.0, float(2 * stats.binom.cdf(min(gains, losses), gains + losses, 0.5)))


def _example(record: Record) -> tuple[Any, Any]:
    return record.get("row"), record.get("id")
