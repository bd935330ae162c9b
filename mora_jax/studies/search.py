"""Which learning rate an arm gets: the best mean over several seeds, inside of what was tried.

All rates of a grid are trained on a first seed, and the grid grows by its own factor on the side where its best rate
lies at an edge. Only the best two go on to the other seeds (successive halving), and the best mean is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mora_jax.studies.study import CHOOSING_SEEDS, rounded

#: A grid grows by at most so many rates on a side.
GROWTH = 6
_HALVED = 2


@dataclass(frozen=True)
class Search:
    """How far the search for a rate is.

    Attributes:
        wanted: (rate, seed) of the runs that it needs next.
        rate: the chosen one; None while there is none, and where no run ended with a finite value.
        inside: whether a lower and a higher rate were tried.
    """

    wanted: tuple[tuple[float, int], ...]
    rate: float | None
    inside: bool


def search(
    grid: Sequence[float], losses: Mapping[float, Mapping[int, float]], seeds: Sequence[int] = CHOOSING_SEEDS
) -> Search:
    """The next step of a search, which depends on nothing but its arguments.

    Args:
        grid: the rates that it begins with, at least two, rising.
        losses: by rate and seed, lower is better; infinite for runs that diverged.
        seeds: over which the mean is taken, in the order in which they are trained.

    >>> search([1e-3, 2e-3], {}, [0]).wanted
    ((0.001, 0), (0.002, 0))
    >>> search([1e-3, 2e-3], {1e-3: {0: 2.0}, 2e-3: {0: 1.0}}, [0]).wanted
    ((0.004, 0),)
    >>> search([1e-3, 2e-3], {1e-3: {0: 2.0}, 2e-3: {0: 1.0}, 4e-3: {0: 1.5}}, [0]).rate
    0.002
    """
    factor = grid[1] / grid[0]
    lowest, highest = rounded(grid[0] / factor**GROWTH), rounded(grid[-1] * factor**GROWTH)
    tried = alive = set(grid)
    best = grid[0]
    for count in range(1, len(seeds) + 1):
        some = seeds[:count]
        while True:
            wanted = [(rate, seed) for seed in some for rate in sorted(alive) if seed not in losses.get(rate, {})]
            if wanted:
                return Search(tuple(wanted), None, False)
            means = {rate: sum(losses[rate][seed] for seed in some) / count for rate in alive}
            best = min(means, key=lambda rate: (means[rate], rate))
            further = set[float]()
            if best == min(tried) and best > lowest:
                further = {rounded(best / factor)}
            elif best == max(tried) and best < highest:
                further = {rounded(best * factor)}
            if not further:
                break
            tried, alive = tried | further, alive | further
        alive = set(sorted(means, key=lambda rate: (means[rate], rate))[:_HALVED])
    inside = min(tried) < best < max(tried)
    return Search((), best if math.isfinite(means[best]) else None, inside)
