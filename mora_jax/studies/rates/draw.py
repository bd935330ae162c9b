"""The figures of the study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mora_jax.studies.figures import legend, new_figure, style
from mora_jax.studies.rates.minima import best_rate
from mora_jax.studies.rates.readings import (
    FULL,
    against,
    capacity,
    grid,
    large_batch,
    position,
    row_levels,
    sweep_level,
)
from mora_jax.studies.results import Results


def draw(results: Results) -> dict[str, Any]:
    """Loss against rate, the best rates, capacity and batch size."""
    found = {"rates": _rates(results), "best_rates": _best_rates(results)}
    if len(row_levels(results)) > 1:
        found["capacity"] = _capacity(results)
    if large_batch(results) is not None:
        found["batch"] = _batches(results)
    return found


def _rates(results: Results) -> Any:
    """A panel for LoRA by rank and one for MoRA, full fine-tuning in both."""
    level = sweep_level(results)
    arms = results.arms_at(level)
    families = [[arm for arm in arms if arm.startswith(kind)] for kind in ("LoRA", "MoRA")]
    figure, [panels] = new_figure(2, height=4.6)
    losses = {arm: grid(results, "held_out_loss", arm, level) for arm in arms}
    every = [loss for values in losses.values() for loss in values.values() if math.isfinite(loss)]
    for panel, family in zip(panels, families, strict=True):
        shown = [arm for arm in (*family, FULL) if losses.get(arm)]
        for place, arm in enumerate(shown):
            points = sorted(losses[arm].items())
            look = style(0 if arm == FULL else place + 1)
            panel.plot(*zip(*points, strict=True), label=arm, **look)
            lowest = best_rate(losses[arm])
            if lowest is not None:
                panel.axvline(lowest, color=look["color"], linestyle=look["linestyle"], linewidth=0.8, alpha=0.6)
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="learning rate (thin lines: minima)",
            ylabel="held-out loss, nats a token",
        )
        if every:
            panel.set_ylim(min(every) * 0.93, max(every) * 1.08)
            _plain_ticks(panel)
        panel.grid(alpha=0.3, which="both")
        if shown:
            panel.legend(frameon=False, fontsize=8, loc="best")
    return figure


def _plain_ticks(panel: Any) -> None:
    """Losses in plain figures."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    panel.yaxis.set_major_locator(FixedLocator([0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _best_rates(results: Results) -> Any:
    """The position of each minimum with its interval, one arm below the other."""
    level = sweep_level(results)
    arms = results.arms_at(level)
    figure, [[panel]] = new_figure(width=6.5, height=4.2)
    for place, arm in enumerate(arms):
        found = position(results, arm, level)
        if math.isnan(found.mean):
            continue
        middle = math.exp(found.mean)
        ends = [[middle - math.exp(found.low)], [math.exp(found.high) - middle]] if found.half is not None else 0
        look = style(0 if arm == FULL else 1 if arm.startswith("LoRA") else 2)
        panel.errorbar(middle, -place, xerr=ends, color=look["color"], marker=look["marker"], capsize=3)
    panel.set_yticks([-place for place in range(len(arms))], arms)
    panel.set(xscale="log", xlabel="best learning rate, 95 % interval over seeds")
    _rate_ticks(panel)
    panel.grid(alpha=0.3, which="both", axis="x")
    return figure


def _rate_ticks(panel: Any) -> None:
    """Rates in plain figures, three a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _capacity(results: Results) -> Any:
    """What an arm loses to full fine-tuning against the bits that it holds for each that there is to learn."""
    figure, [panels] = new_figure(2)
    words = {"loss": "loss − full, on new rows", "trained_rows_loss": "loss − full, on trained rows"}
    for panel, (metric, label) in zip(panels, words.items(), strict=True):
        for index, (level, count) in enumerate(row_levels(results).items()):
            arms = [arm for arm in results.arms_at(level) if arm != FULL and "MoRA" not in arm]
            _points(panel, results, metric, level, arms, style(index), f"{count:,} rows, LoRA")
            moras = [arm for arm in results.arms_at(level) if "MoRA" in arm]
            _points(
                panel,
                results,
                metric,
                level,
                moras,
                style(index) | {"linestyle": "none", "marker": "x"},
                f"{count:,} rows, MoRA",
            )
        panel.axhline(0, color="0.5", linewidth=1, zorder=0)
        panel.axvline(1, color="0.5", linewidth=1, linestyle=":", zorder=0)
        panel.set(xscale="log", xlabel="bits held for each bit to learn (dotted: 1)", ylabel=label)
        panel.grid(alpha=0.3)
    legend(figure, panels[0])
    return figure


def _points(
    panel: Any, results: Results, metric: str, level: str, arms: Sequence[str], look: dict[str, Any], label: str
) -> None:
    points = []
    for arm in arms:
        held, found = capacity(results, arm, level), against(results, metric, arm, FULL, level)
        if held is not None and found.n:
            points.append((held, found.mean, found.half or 0.0))
    if points:
        x, y, half = zip(*sorted(points), strict=True)
        panel.errorbar(x, y, yerr=half, capsize=3, label=label, **look)


def _batches(results: Results) -> Any:
    """The loss of each arm at both sizes of a batch."""
    level, large = sweep_level(results), large_batch(results) or ""
    sizes = {one.name: one.values["batch_size"] for one in results.preset.levels}
    figure, [[panel]] = new_figure()
    for index, arm in enumerate(results.arms_at(large)):
        found = [results.mean("loss", arm, one) for one in (level, large)]
        if any(one.n == 0 for one in found):
            continue
        # Side by side, so that the bars of one arm don't hide those of another.
        places = [sizes[one] * 1.03 ** (index - 1) for one in (level, large)]
        halves = [one.half or 0.0 for one in found]
        panel.errorbar(
            places,
            [one.mean for one in found],
            yerr=halves,
            capsize=3,
            label=arm,
            **style(index + 1 if arm != FULL else 0),
        )
    panel.set(xscale="log", xlabel="rows of a batch", ylabel="loss on new rows, nats a token")
    panel.set_xticks([sizes[level], sizes[large]], [str(sizes[level]), str(sizes[large])])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    return figure
