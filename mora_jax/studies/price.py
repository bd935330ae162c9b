"""What a study takes on an accelerator, by the formulas of `mora-jax plan`: memory, hours, and the price."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from mora_jax.planning.plan import by_formula
from mora_jax.planning.topology import Topology
from mora_jax.studies.conclusion import table
from mora_jax.studies.run import cell_config
from mora_jax.studies.study import Cell, Preset, choosing_cells, reported_cells

_UNREAD = {"data.train": ("unread",)}


@dataclass(frozen=True)
class ArmPrice:
    """The cells of an arm.

    Attributes:
        cells: how many there are, at all levels.
        needed: bytes on each chip.
        fits: whether they are there.
        hours: shortest and longest of all cells, without evaluations.
    """

    cells: int
    needed: float
    fits: bool
    hours: tuple[float, float]


def price_arms(preset: Preset, model: str, values: dict[str, Any], topology: Topology) -> dict[str, ArmPrice]:
    """Each arm's cells, by its name.

    Args:
        preset: of the study.
        model: the base's folder or name.
        values: its HuggingFace config.
        topology: the chips.

    Raises:
        InputError: as `by_formula`.
    """
    first = {(level.name, arm.name): arm.rates[0] for level, arm in preset.pairs() if arm.rates}
    found: dict[str, ArmPrice] = {}
    for (_, arm), cells in itertools.groupby(
        sorted([*choosing_cells(preset), *reported_cells(preset, first)], key=_place), key=_place
    ):
        members = list(cells)
        plan = by_formula(cell_config(members[0], preset, model, _UNREAD, "unread"), values, topology)
        low, high = plan.hours or (0.0, 0.0)
        before = found.get(arm, ArmPrice(0, 0.0, True, (0.0, 0.0)))
        count = len(members)
        found[arm] = ArmPrice(
            before.cells + count,
            max(before.needed, plan.needed),
            before.fits and plan.fits,
            (before.hours[0] + low * count, before.hours[1] + high * count),
        )
    return {arm.name: found[arm.name] for _, arm in preset.pairs()}


def _place(cell: Cell) -> tuple[str, str]:
    return cell.level.name, cell.arm.name


def price_table(prices: dict[str, ArmPrice], topology: Topology, price: float | None) -> str:
    """The arms with their sum, in Markdown.

    Args:
        prices: by arm.
        topology: the chips.
        price: of one chip for one hour.
    """
    rows = [
        [name, str(one.cells), f"{one.needed / 1e9:.1f}{'' if one.fits else ' (does not fit)'}", _range(*one.hours)]
        for name, one in prices.items()
    ]
    low, high = (sum(one.hours[end] for one in prices.values()) for end in (0, 1))
    rows.append(["all", str(sum(one.cells for one in prices.values())), "", _range(low, high)])
    text = table(
        ["arm", "cells", f"GB a chip of {topology.usable_bytes / 1e9:.1f}", "hours, evaluations left out"], rows
    )
    if price is None:
        return text
    chips = price * topology.chips
    return f"{text}\n\nAt {price:g} a chip and hour: {_range(low * chips, high * chips)} for all cells"


def _range(low: float, high: float) -> str:
    return f"{_short(low)} to {_short(high)}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
