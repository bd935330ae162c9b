"""Means and paired differences over seeds, with 95 % intervals by Student's t.

The unit is the seed: what varies is the data, their order and the start of the adapters. Standard errors over examples
say nothing of that, and are not mixed in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: over `n` seeds.
        half: of the 95 % interval; None for fewer than two seeds.
        n: seeds.
    """

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        """The interval's lower end; -inf without one."""
        return -math.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        """The interval's upper end; inf without one."""
        return math.inf if self.half is None else self.mean + self.half

    @property
    def decided(self) -> bool:
        """Whether 0 lies outside of it."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 3, *, sign: bool = False) -> str:
        """Such as `0.482 ± 0.012`."""
        if math.isnan(self.mean):
            return "missing"
        mean = f"{self.mean:+.{digits}f}" if sign else f"{self.mean:.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"


def interval(values: Iterable[float]) -> Interval:
    """The mean of values that came of one seed each, those that are no numbers left out.

    >>> interval([0.10, 0.14, 0.06]).text(4)
    '0.1000 ± 0.0994'
    """
    from scipy import stats  # type: ignore[import-untyped]  # jax needs it

    found = np.array([value for value in values if value is not None and not math.isnan(value)], float)
    if not len(found):
        return Interval(math.nan, None, 0)
    if len(found) < 2:
        return Interval(float(found.mean()), None, 1)
    error = found.std(ddof=1) / math.sqrt(len(found))
    return Interval(float(found.mean()), float(stats.t.ppf(0.975, len(found) - 1) * error), len(found))


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Interval:
    """The first minus the second, by the seeds that both have."""
    return interval(first[seed] - second[seed] for seed in sorted(set(first) & set(second)))


def verdict(difference: Interval, more: str, less: str) -> str:
    """What a difference says, in words: `more` or `less` where its interval leaves 0 out."""
    if difference.n == 0:
        return "missing"
    if difference.n == 1:
        return "one seed, so undecided"
    if not difference.decided:
        return "no difference shown"
    return more if difference.mean > 0 else less
