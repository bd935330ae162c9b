"""The figures of the study `forget`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mora_jax.studies.figures import DASHES, MARKERS, draw_curves, legend, new_figure, style
from mora_jax.studies.forget.conclude import KNOWN, LEARNED
from mora_jax.studies.forget.intruders import EPSILON, EPSILONS, FACTORS
from mora_jax.studies.forget.presets import CONTROL, FULL
from mora_jax.studies.forget.spectrum import COUNTS
from mora_jax.studies.forget.trade import Path, paths_by_rate
from mora_jax.studies.results import Results


def figures(results: Results) -> dict[str, Any]:
    """All, by name."""
    found = {"pareto": pareto(results), "curves": curves(results)}
    metrics = set(results.frame["metric"])
    if "rank90" in metrics:
        found["spectrum"] = spectrum(results)
    if f"intruders_{EPSILON}" in metrics:
        found["intruders"] = intruders(results)
    return found


def pareto(results: Results) -> Any:
    """Forgetting against learning on the seed that chooses: a panel an arm, a path a learning rate, others in grey."""
    found = {arm: paths_by_rate(results, arm, LEARNED, KNOWN) for arm in results.arms}
    columns = min(4, len(found))
    figure, panels = new_figure(columns, math.ceil(len(found) / columns), width=3.9, height=3.4)
    every = [path for by_rate in found.values() for path in by_rate.values()]
    wide, high = _limits(every)
    for index, (arm, panel) in enumerate(zip(found, panels.flat, strict=False)):
        for path in every:
            panel.plot(*_moved(path), color="0.85", linewidth=1, zorder=1)
        for number, (rate, path) in enumerate(sorted(found[arm].items())):
            chosen = rate == results.rate(arm)
            panel.plot(
                *_moved(path),
                color=style(index)["color"],
                linestyle=DASHES[number % len(DASHES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                linewidth=2.4 if chosen else 1.2,
                label=f"{rate:g}{' (chosen)' if chosen else ''}",
                zorder=3,
            )
        panel.set_title(arm, fontsize=10)
        panel.set_xlim(*wide)
        panel.set_ylim(*high)
        panel.grid(alpha=0.3)
        if found[arm]:
            panel.legend(title="learning rate", fontsize=7, title_fontsize=7, loc="lower right")
    for panel in list(panels.flat)[len(found) :]:
        panel.set_axis_off()
    for panel in panels[-1]:
        panel.set_xlabel("forgetting: rise of the old domain's loss")
    for row in panels:
        row[0].set_ylabel("learning: fall of the new one's loss")
    return figure


def _moved(path: Path) -> tuple[list[float], list[float]]:
    """Forgetting and learning since the start."""
    learned, known = path[0]
    return [after - known for _, after in path], [learned - after for after, _ in path]


def _limits(every: list[Path]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of both axes: the steep beginning and runs that diverge are cut off, so that the rest can be told apart."""
    moved = [_moved(path) for path in every if path]
    x = np.concatenate([np.array(one[0]) for one in moved] or [np.zeros(1)])
    y = np.concatenate([np.array(one[1]) for one in moved] or [np.zeros(1)])
    wide, high = float(np.nanpercentile(x, 96)), float(np.nanmax(y))
    return (min(-0.05 * wide, float(np.nanmin(x))), 1.1 * wide + 1e-3), (0.55 * high, 1.04 * high + 1e-3)


def curves(results: Results) -> Any:
    """Both domains against steps, at the chosen rates."""
    figure, [panels] = new_figure(2)
    for panel, (metric, label) in zip(panels, ((LEARNED, "new"), (KNOWN, "old")), strict=True):
        draw_curves(panel, results, metric)
        panel.set_ylabel(f"loss on the {label} domain, nats a token")
    _log(panels[0])
    lowest = [float(np.nanmin(line.get_ydata())) for line in panels[0].get_lines()]
    if lowest:
        panels[0].set_ylim(bottom=0.7 * min(lowest))  # wide bands would squeeze the lines
    legend(figure, panels[0])
    return figure


def _log(panel: Any) -> None:
    """A logarithmic axis whose labels are plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _mean(results: Results, metric: str, arm: str) -> float:
    return results.mean(metric, arm).mean


def spectrum(results: Results) -> Any:
    """Cumulative energies by kind of matrix, the rank against steps, and by layer and module in full fine-tuning."""
    figure, panels = new_figure(2, 2, width=5.6, height=4.1)
    first, second, third, fourth = panels.flat
    noise = _noise(results)
    for panel, kind in ((first, "attention"), (second, "MLP")):
        for index, arm in enumerate(results.arms):
            if CONTROL in arm:
                continue
            points = [(count, _mean(results, f"energy_{kind}_{count}", arm)) for count in COUNTS]
            points = [(count, value) for count, value in points if not math.isnan(value)]
            if points:
                panel.plot(*zip(*points, strict=True), label=arm, **style(index))
        if noise:
            panel.plot(*zip(*noise, strict=True), color="0.5", linestyle="--", label="independent noise")
        panel.axhline(0.9, color="0.5", linewidth=1, linestyle=":", zorder=0)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel(f"singular values of the change, {kind}")
        panel.set_ylabel("share of its energy")
        panel.set_ylim(0, 1.03)
        panel.grid(alpha=0.3)
    draw_curves(third, results, "rank90", only=[arm for arm in results.arms if CONTROL not in arm])
    third.set_yscale("log", base=2)
    third.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    third.set_ylabel("rank at 90 % of the energy")
    _by_layer(fourth, results)
    legend(figure, first, columns=3)
    return figure


def _noise(results: Results) -> list[tuple[int, float]]:
    rows = results.frame[results.frame["metric"].str.startswith("energy_noise_")]
    return sorted(
        {
            int(metric.rpartition("_")[2]): value for metric, value in zip(rows["metric"], rows["value"], strict=True)
        }.items()
    )


def _by_layer(panel: Any, results: Results) -> None:
    """The rank by layer and module, in numbers on shades."""
    arm = FULL if FULL in results.arms else results.arms[0]
    prefix = "rank90_"
    names = [name for name in dict.fromkeys(results.frame["metric"]) if name.startswith(prefix)]
    places = [name.removeprefix(prefix).rpartition("_") for name in names]
    known = [(module, int(layer)) for module, _, layer in places if layer.isdecimal()]
    if not known:
        panel.set_axis_off()
        return
    modules, layers = list(dict.fromkeys(module for module, _ in known)), sorted({layer for _, layer in known})
    grid = np.array([[_mean(results, f"{prefix}{module}_{layer}", arm) for layer in layers] for module in modules])
    panel.imshow(grid, cmap="Blues", aspect="auto", vmin=0)
    half = np.nanmax(grid) / 2 if np.isfinite(grid).any() else 0.0
    for (row, column), value in np.ndenumerate(grid):
        if not math.isnan(value):
            colour = "white" if value > half else "black"
            panel.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    panel.set_yticks(range(len(modules)), modules)
    panel.set_xticks(range(len(layers)), layers)
    panel.set_xlabel(f"layer; rank at 90 % of the energy, {arm}")


def intruders(results: Results) -> Any:
    """How many there are against ε, and both losses against λ."""
    figure, panels = new_figure(3)
    count, old, new = panels[0]
    factors = sorted({*FACTORS, 1.0})
    for index, arm in enumerate(results.arms):
        if CONTROL in arm:
            continue
        count.plot(
            EPSILONS, [_mean(results, f"intruders_{below}", arm) for below in EPSILONS], label=arm, **style(index)
        )
        for panel, metric in ((old, KNOWN), (new, LEARNED)):
            names = [metric if factor == 1 else f"{metric}_scaled_{factor}" for factor in factors]
            panel.plot(factors, [_mean(results, name, arm) for name in names], label=arm, **style(index))
    count.set_xlabel("ε")
    count.set_ylabel(f"intruders a matrix, of {results.preset.data['top']} leading vectors")
    for panel, label in ((old, "old"), (new, "new")):
        panel.set_xlabel(f"λ, the factor on intruders at ε = {EPSILON} (1: as trained)")
        panel.set_ylabel(f"loss on the {label} domain, nats a token")
    _log(new)
    for panel in panels[0]:
        panel.grid(alpha=0.3)
    legend(figure, count, columns=5)
    return figure
