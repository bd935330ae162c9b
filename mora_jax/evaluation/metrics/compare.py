"""Two models on the same examples: the difference of each metric, in pairs, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from mora_jax.errors import InputError
from mora_jax.evaluation.metrics.estimate import Mean, Metric, Record


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

    def to_dict(self) -> dict[str, float | None]:
        """All of it, ready for JSON."""
        return self._asdict()


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
    found = {}
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
        found[metric.name] = Comparison(
            value.value, other.value, difference.value, difference.stderr, low, high, p_value
        )
    return found


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
    gains = sum(one > other for one, other in zip(first, second, strict=True))
    losses = sum(one < other for one, other in zip(first, second, strict=True))
    tail = sum(math.comb(gains + losses, k) for k in range(min(gains, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (gains + losses))


def _example(record: Record) -> tuple[Any, Any]:
    return record.get("row"), record.get("id")
