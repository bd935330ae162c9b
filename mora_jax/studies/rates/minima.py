"""Where the loss is lowest over learning rates: a parabola in the logarithm of the rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from mora_jax.studies.intervals import Interval


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The learning rate at the lowest point of the parabola through the lowest loss and those beside it.

    Args:
        losses: by learning rate; those that are no numbers are left out.

    Returns:
        None where there are fewer than three, or where that point is a highest one or lies outside of the three.
    """
    points = sorted((rate, loss) for rate, loss in losses.items() if math.isfinite(loss))
    if len(points) < 3:
        return None
    lowest = min(range(len(points)), key=lambda place: points[place][1])
    first = min(max(lowest - 1, 0), len(points) - 3)
    rates, values = np.array(points[first : first + 3]).T
    logs = np.log(rates)
    # Around the middle one, so that the digits of the rates don't cancel.
    curvature, slope, _ = np.polyfit(logs - logs[1], values, 2)
    if curvature <= 0:
        return None
    found = logs[1] - slope / (2 * curvature)
    return float(np.exp(found)) if logs[0] <= found <= logs[2] else None


def factor(logs: Interval) -> str:
    """A mean of logarithms as a factor, with its interval.

    >>> factor(Interval(math.log(10), math.log(2), 3))
    '10 (5 to 20)'
    """
    if math.isnan(logs.mean):
        return "not found"
    words = f"{math.exp(logs.mean):.2g}"
    return words if logs.half is None else f"{words} ({math.exp(logs.low):.2g} to {math.exp(logs.high):.2g})"
