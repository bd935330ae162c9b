"""How studies draw: one colour, dash and marker an arm, means as lines, seeds as a band of the 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mora_jax.display.figures import new_figure as empty_figure
from mora_jax.studies.intervals import interval
from mora_jax.studies.results import Results

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D1F")
DASHES = ("-", (0, (5, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)))
MARKERS = "osD^vPX*"


def style(index: int) -> dict[str, Any]:
    """Of the arm with this number; colour, dash and marker differ between neighbours."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
    }


def new_figure(columns: int = 1, rows: int = 1, *, width: float = 5.2, height: float = 3.9) -> tuple[Any, Any]:
    """A figure and its panels, `[rows, columns]`; `width` and `height` are a panel's, in inches.

    Raises:
        InputError: matplotlib isn't installed.
    """
    figure = empty_figure(width * columns, height * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend(figure: Any, *panels: Any, columns: int = 4) -> None:
    """One legend below all panels, of what these hold."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=min(columns, len(found)), frameon=False
    )


def draw_curves(panel: Any, results: Results, metric: str, level: str = "", *, only: Sequence[str] = ()) -> None:
    """A metric against steps: a line an arm through the means over seeds, a band of their 95 % intervals."""
    for index, arm in enumerate(results.arms):
        curves = results.curves(metric, arm, level)
        if not curves or (only and arm not in only):
            continue
        by_step: dict[int, list[float]] = {}
        for rows in curves.values():
            for step, value in rows:
                by_step.setdefault(step, []).append(value)
        steps = sorted(by_step)
        found = [interval(by_step[step]) for step in steps]
        line = panel.plot(steps, [one.mean for one in found], label=arm, **style(index))[0]
        if all(one.half is not None for one in found):
            low, high = [one.low for one in found], [one.high for one in found]
            panel.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    panel.set_xlabel("step")
    panel.grid(alpha=0.3)


def draw_rates(panel: Any, results: Results, metric: str, level: str = "") -> None:
    """A metric against the learning rate, on the seed that chooses; a star at the chosen rate.

    Its value is the last, or the best where the study chooses by that.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    best = max if results.study.higher else min
    for index, arm in enumerate(results.arms):
        curves = results.curves_by_rate(metric, arm, level)
        points = sorted(
            (rate, best(value for _, value in rows) if results.study.chosen_at_best else rows[-1][1])
            for rate, rows in curves.items()
        )
        if not points:
            continue
        panel.plot(*zip(*points, strict=True), label=arm, **style(index))
        chosen = dict(points).get(results.rate(arm, level) or math.nan)
        if chosen is not None:
            at = results.rate(arm, level), chosen
            panel.plot(*at, "*", color="white", markeredgecolor=style(index)["color"], markersize=13, zorder=5)
    panel.set_xscale("log")
    # Each digit would be named on an axis of one or two decades, one over the other.
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("learning rate (star: chosen)")
    panel.grid(alpha=0.3)
