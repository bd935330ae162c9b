"""What a study takes on an accelerator, by the formulas of `mora-jax plan`: memory, hours, and the price."""

from __future__ import annotations

from typing import Any

from mora_jax.planning.plan import by_formula
from mora_jax.planning.topology import Topology
from mora_jax.studies.conclusion import table
from mora_jax.studies.run import SEARCHED, cell_config
from mora_jax.studies.study import Preset, reported_cells


def price_table(preset: Preset, model: str, values: dict[str, Any], topology: Topology, price: float | None) -> str:
    """A row an arm with its cells at all levels, where no grid grows, and their sum, in Markdown.

    Args:
        preset: of the study.
        model: the base's folder or name.
        values: its HuggingFace config.
        topology: the chips.
        price: of one chip for one hour.

    Raises:
        InputError: as `by_formula`.
    """
    guess = {(level.name, arm.name): arm.rates[0] for level, arm in preset.pairs() if arm.rates}
    reported = list(reported_cells(preset, guess))
    prices: dict[str, tuple[int, float, bool, float, float]] = {}
    for level, arm in preset.pairs():
        cells = [cell for cell in reported if (cell.level, cell.arm) == (level, arm)]
        count = len(cells) + SEARCHED * (len(arm.rates) > 1)
        plan = by_formula(cell_config(cells[0], preset, model, {"data.train": ("unread",)}, "unread"), values, topology)
        low, high = plan.hours or (0.0, 0.0)
        cells_before, needed, fits, *hours = prices.get(arm.name, (0, 0.0, True, 0.0, 0.0))
        prices[arm.name] = (
            cells_before + count,
            max(needed, plan.needed),
            fits and plan.fits,
            hours[0] + low * count,
            hours[1] + high * count,
        )
    rows = [
        [name, str(cells), f"{needed / 1e9:.1f}{'' if fits else ' (does not fit)'}", _range(low, high)]
        for name, (cells, needed, fits, low, high) in prices.items()
    ]
    total, _, _, low, high = map(sum, zip(*prices.values(), strict=True))
    rows.append(["all", str(total), "", _range(low, high)])
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
