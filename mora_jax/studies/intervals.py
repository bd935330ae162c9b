"""Means and paired differences over seeds: 95 % intervals by Student's t, p-values, and what could have been detected.

The unit is the seed: what varies is the data, their order and the start of the adapters. Standard errors over examples
say nothing of that, and are not mixed in.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

POWER = 0.8
LEVEL = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: over `n` seeds.
        error: its standard error; None for fewer than two seeds.
        n: seeds with a finite value.
        lost: seeds without one: runs that diverged or failed.
    """

    mean: float
    error: float | None
    n: int
    lost: int = 0

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval."""
        return None if self.error is None else _quantile(self.n) * self.error

    @property
    def low(self) -> float:
        """The interval's lower end; -inf without one."""
        return -math.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        """The interval's upper end; inf without one."""
        return math.inf if self.half is None else self.mean + self.half

    @property
    def p(self) -> float | None:
        """Of the two-sided t-test against 0, uncorrected."""
        from scipy import stats  # type: ignore[import-untyped]  # jax needs it

        if self.error is None:
            return None
        if self.error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.n - 1))

    @property
    def detectable(self) -> float | None:
        """The smallest mean that this test would show in four of five studies of as many seeds and this spread."""
        return None if self.error is None else _noncentrality(self.n) * self.error

    def text(self, digits: int = 3, *, sign: bool = False) -> str:
        """Such as `0.482 ± 0.012`."""
        if math.isnan(self.mean):
            return "diverged" if self.lost else "missing"
        mean = f"{self.mean:+.{digits}f}" if sign else f"{self.mean:.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"

    @property
    def seeds(self) -> str:
        """How many there are, such as `3`, or `2 (1 diverged)`."""
        return f"{self.n} ({self.lost} diverged)" if self.lost else str(self.n)


@functools.cache
def _quantile(n: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(1 - LEVEL / 2, n - 1))


@functools.cache
def _noncentrality(n: int) -> float:
    """Of the t-distribution that leaves the interval around 0 with probability `POWER`."""
    from scipy import optimize, stats

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(_quantile(n), n - 1, shift) - POWER)

    return float(optimize.brentq(lacking, 0.1, 50.0))


def interval(values: Iterable[float]) -> Interval:
    """The mean of values that came of one seed each; those that are not finite are counted and left out.

    >>> interval([0.10, 0.14, 0.06, float("nan")]).text(4)
    '0.1000 ± 0.0994'
    """
    every = np.array(list(values), float)
    finite = every[np.isfinite(every)]
    n, lost = len(finite), len(every) - len(finite)
    if n == 0:
        return Interval(math.nan, None, 0, lost)
    error = float(finite.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return Interval(float(finite.mean()), error, n, lost)


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """The first minus the second, by the seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in sorted(set(first) & set(second))}


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Interval:
    """The mean of `differences`."""
    return interval(differences(first, second).values())


def holm(ps: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's method (1979), in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected
