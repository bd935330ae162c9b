"""Which cells a study trains: its search for learning rates, what is reported, their configurations and their price.

All rates of a grid are trained on a first seed, and the grid grows by its own factor on the side where its best rate
lies at an edge. Only the best two go on to the other seeds (successive halving), and the best mean is chosen.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd  # type: ignore[import-untyped]  # datasets needs it

from mora_jax.errors import InputError
from mora_jax.planning.plan import by_formula
from mora_jax.planning.topology import Topology
from mora_jax.studies import study
from mora_jax.studies.conclusion import table
from mora_jax.studies.rows import is_embedded
from mora_jax.studies.study import CHOOSING_SEEDS, REPORTED, Cell, Preset, rounded
from mora_jax.training.config.load import check_together
from mora_jax.training.config.schema import Config, lay_over

#: Runs of an arm's search where its grid does not grow: three on a first seed, two on each of two others.
SEARCHED = 7
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
    rate: float | None = None
    inside: bool = False


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
    best, means = grid[0], dict[float, float]()
    for count in range(1, len(seeds) + 1):
        some = seeds[:count]
        while True:
            wanted = [(rate, seed) for seed in some for rate in sorted(alive) if seed not in losses.get(rate, {})]
            if wanted:
                return Search(tuple(wanted))
            means = {rate: sum(losses[rate][seed] for seed in some) / count for rate in alive}
            best = min(means, key=lambda rate: (means[rate], rate))
            if best == min(tried) and best > lowest:
                further = {rounded(best / factor)}
            elif best == max(tried) and best < highest:
                further = {rounded(best * factor)}
            else:
                break
            tried, alive = tried | further, alive | further
        alive = set(sorted(means, key=lambda rate: (means[rate], rate))[:_HALVED])
    return Search((), best if math.isfinite(means[best]) else None, min(tried) < best < max(tried))


def reported_cells(
    preset: Preset, chosen: Mapping[tuple[str, str], float], *, perturbed: bool = False
) -> Iterator[Cell]:
    """The cells that are reported, with those beside them.

    Args:
        preset: of the study.
        chosen: the rate of each arm at each level, by the names of level and arm; pairs without one are left out.
        perturbed: those that start from perturbed weights too.
    """
    single = {(level.name, arm.name): arm.rates[0] for level, arm in preset.pairs() if len(arm.rates) == 1}
    rates = {**chosen, **single}
    for level, arm in preset.pairs():
        rate = rates.get((level.name, arm.rate_of or arm.name))
        if rate is None:
            continue
        stages = {rate: REPORTED}
        if level.neighbours:
            step = arm.rates[1] / arm.rates[0] if len(arm.rates) > 1 else 2.0
            stages = {rounded(rate / step): study.NEIGHBOUR, rate: REPORTED, rounded(rate * step): study.NEIGHBOUR}
        if (equal := rates.get((level.name, arm.control_of))) is not None:
            stages.setdefault(equal, study.EQUAL_RATE)
        for other, stage in stages.items():
            for seed in range(1, preset.seeds + 1):
                cell = Cell(level, arm, other, seed, stage)
                yield cell
                if perturbed and stage == REPORTED:
                    yield dataclasses.replace(cell, stage=study.EXPLORATORY, perturbed=True)


def cell_names(preset: Preset, *, grown: bool = False) -> list[str]:
    """The names of cells: of reported ones with each rate that may be chosen.

    Args:
        preset: of a study.
        grown: whether grids have grown as far as they can; else they are as they begin.
    """
    grids = {(level.name, arm.name): arm.rates for level, arm in preset.pairs()}
    cells = list[Cell]()
    for level, arm in preset.pairs():
        searched = level.name, arm.rate_of or arm.name
        rates = grids[searched]
        if grown and len(rates) > 1:
            factor = rates[1] / rates[0]
            rates = tuple(rounded(rates[0] * factor**power) for power in range(-GROWTH, len(rates) + GROWTH))
        if len(arm.rates) > 1:
            cells += [Cell(level, arm, rate, CHOOSING_SEEDS[0], study.CHOOSING) for rate in rates]
        one_arm = dataclasses.replace(preset, levels=(dataclasses.replace(level, arms=(arm,)),))
        for rate in rates:
            cells += reported_cells(one_arm, {searched: rate})
    return list(dict.fromkeys(cell.name for cell in cells))


def cell_config(
    cell: Cell, preset: Preset, model: str, data: Mapping[str, Any], out: str, changes: Mapping[str, Any] | None = None
) -> Config:
    """The configuration of a cell.

    Args:
        cell: which.
        preset: of the study.
        model: the base's folder.
        data: the keys that name the data.
        out: the cell's run directory.
        changes: keys that the study sets for the cell.

    Raises:
        InputError: settings that don't go together.
    """
    # The default dtype is the machine's; studies of the embedded model give the same everywhere.
    embedded = {"model.dtype": "float32"} if is_embedded(model) else {}
    settings = {
        "model.path": model,
        **embedded,
        "seed": cell.seed,
        "mesh.data": 1,
        "train.eval_on_start": True,
        **preset.settings,
        **cell.level.settings,
        **data,
        **cell.arm.settings,
        **(changes or {}),
        "optimizer.learning_rate": cell.rate,
        "out": out,
    }
    try:
        config = lay_over(Config(), [(name, value, name) for name, value in settings.items()])
        check_together(config)
    except InputError as error:
        raise InputError(f"{cell.name}: {error}") from None
    return config


def first_rates(preset: Preset) -> dict[tuple[str, str], float]:
    """A rate for each arm at each level, before any is chosen."""
    return {(level.name, arm.name): arm.rates[0] for level, arm in preset.pairs() if arm.rates}


def price_table(preset: Preset, model: str, values: dict[str, Any], topology: Topology, price: float | None) -> str:
    """What a study takes on an accelerator by the formulas of `mora-jax plan`, where no grid grows, in Markdown.

    A row an arm with its cells at all levels, and their sum.

    Args:
        preset: of the study.
        model: the base's folder or name.
        values: its HuggingFace config.
        topology: the chips.
        price: of one chip for one hour.

    Raises:
        InputError: as `by_formula`.
    """
    reported = list(reported_cells(preset, first_rates(preset)))
    costs = []
    for level, arm in preset.pairs():
        cells = [cell for cell in reported if (cell.level, cell.arm) == (level, arm)]
        count = len(cells) + SEARCHED * (len(arm.rates) > 1)
        plan = by_formula(cell_config(cells[0], preset, model, {"data.train": ("unread",)}, "unread"), values, topology)
        low, high = plan.hours or (0.0, 0.0)
        costs.append((arm.name, count, plan.needed, plan.fits, low * count, high * count))
    frame = pd.DataFrame(costs, columns=["arm", "cells", "needed", "fits", "low", "high"])
    by_arm = {"cells": "sum", "needed": "max", "fits": "all", "low": "sum", "high": "sum"}
    rows = [
        [arm, f"{cells}", f"{needed / 1e9:.1f}{'' if fits else ' (does not fit)'}", _range(low, high)]
        for arm, cells, needed, fits, low, high in frame.groupby("arm", sort=False).agg(by_arm).itertuples()
    ]
    low, high = frame["low"].sum(), frame["high"].sum()
    rows.append(["all", str(frame["cells"].sum()), "", _range(low, high)])
    heads = ["arm", "cells", f"GB a chip of {topology.usable_bytes / 1e9:.1f}", "hours, evaluations left out"]
    if price is None:
        return table(heads, rows)
    chips = price * topology.chips
    return f"{table(heads, rows)}\n\nAt {price:g} a chip and hour: {_range(low * chips, high * chips)} for all cells"


def _range(low: float, high: float) -> str:
    return " to ".join(f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in (low, high))
