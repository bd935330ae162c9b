"""The figures of the study of the loss over instructions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mora_jax.studies.figures import draw_rates, legend, new_figure, style
from mora_jax.studies.instruct.compare import all_rows, at_rows, gain, methods, ratio
from mora_jax.studies.intervals import Interval, interval
from mora_jax.studies.results import Results

#: Shi et al., tables 2 and 5: ratio of instruction to output length, AlpacaEval 1.0 of masked and of unmasked loss.
_PUBLISHED = {
    "LIMA": (0.094, 33.06, 32.94),
    "Dolly 9k": (0.297, 21.54, 30.77),
    "Alpaca 5k": (0.567, 16.29, 19.52),
    "Dolly 3k": (0.644, 13.42, 15.11),
    "BBH-ICL": (3.27, 36.20, 44.15),
    "TyDiQA": (5.86, 5.12, 10.10),
    "MMLU-Chat": (26.3, 4.42, 9.78),
}


def draw(results: Results) -> dict[str, Any]:
    """All of them by name."""
    return {
        "crossing": _crossing(results),
        "share": _share(results),
        "rows": _rows(results),
        "epochs": _epochs(results),
        "rates": _rates(results),
    }


def _point(panel: Any, index: int, x: Sequence[float], found: Sequence[Interval], label: str) -> None:
    """A line of differences with their intervals."""
    kept = [(at, one) for at, one in zip(x, found, strict=True) if not math.isnan(one.mean) and not math.isnan(at)]
    if kept:
        panel.errorbar(
            [at for at, _ in kept],
            [one.mean for _, one in kept],
            yerr=[one.half or 0.0 for _, one in kept],
            capsize=3,
            label=label,
            **style(index),
        )


def _against_ratio(panel: Any, results: Results, first: str, second: str) -> None:
    """A line a number of rows; points of one ratio stand beside each other."""
    counts = all_rows(results)
    for index, rows in enumerate(counts):
        names = [one.name for one in at_rows(results, rows) if {first, second} <= set(results.arms_at(one.name))]
        shift = 1.03 ** (index - (len(counts) - 1) / 2)
        found = [gain(results, first, second, name) for name in names]
        _point(panel, index, [ratio(results, name) * shift for name in names], found, f"{rows} rows")
    _logarithmic(panel, [ratio(results, name) for name in results.levels])
    panel.set_xlabel("instruction tokens an answer token")
    panel.set_ylabel("gain in test loss, nats a token")


def _logarithmic(panel: Any, at: Sequence[float]) -> None:
    """An axis of few values, each written out."""
    from matplotlib.ticker import NullFormatter, NullLocator

    known: list[float] = []
    for one in sorted(float(f"{one:.3g}") for one in at if not math.isnan(one)):
        if not known or one > 1.1 * known[-1]:
            known.append(one)
    panel.set_xscale("log")
    if known:
        panel.set_xlim(known[0] / 1.5, known[-1] * 1.5)
        panel.set_xticks(known, [f"{one:g}" for one in known])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.axhline(0, color="0.5", linewidth=1, zorder=0)
    panel.grid(alpha=0.3)


def _crossing(results: Results) -> Any:
    """What unmasked loss gains, a panel a method, and what the paper published."""
    names = methods(results)
    figure, [panels] = new_figure(len(names) + 1, width=4.4)
    for panel, method in zip(panels, names, strict=False):
        _against_ratio(panel, results, f"{method} masked", f"{method} unmasked")
        panel.set_title(f"{method}: masked − unmasked (above 0: unmasked better)", fontsize=9)
    published = panels[-1]
    ratios, before, after = np.array(list(_PUBLISHED.values())).T
    published.plot(ratios, 100 * (after / before - 1), "s", color="0.35", label="data sets")
    line = np.geomspace(0.05, 40, 50)
    published.plot(line, 18.85 * np.log(line) + 25.83, "--", color="0.35", label="the paper's fit")
    for name, at, value in zip(_PUBLISHED, ratios, 100 * (after / before - 1), strict=True):
        below, left = name in ("Dolly 3k", "BBH-ICL"), name == "MMLU-Chat"
        place = (-6 if left else 6, -10 if below else 4)
        published.annotate(
            name, (at, value), place, textcoords="offset points", fontsize=8, ha="right" if left else "left"
        )
    _logarithmic(published, [0.1, 1, 10])
    published.set_xlim(0.05, 45)
    published.set_ylim(-40, 145)
    published.set_xlabel("instruction / output length (words)")
    published.set_ylabel("relative gain in AlpacaEval 1.0, %")
    published.set_title("Shi et al.: Llama-2-7B, full fine-tuning, one run each", fontsize=9)
    published.legend(frameon=False, fontsize=8, loc="upper left")
    legend(figure, panels[0])
    return figure


def _share(results: Results) -> Any:
    """The gain of unmasked loss in two steps: the answer's smaller weight, then the instruction itself."""
    method = methods(results)[0]
    steps = [("masked", "unmasked"), ("masked", "share"), ("share", "unmasked")]
    words = ["in all", "the smaller weight alone", "the instruction beside it"]
    figure, [panels] = new_figure(3, width=4.4)
    for panel, (first, second), said in zip(panels, steps, words, strict=True):
        _against_ratio(panel, results, f"{method} {first}", f"{method} {second}")
        panel.set_title(f"{method}: {first} − {second}, {said}", fontsize=9)
    _same_scale(panels)
    legend(figure, panels[0])
    return figure


def _same_scale(panels: Sequence[Any]) -> None:
    limits = [panel.get_ylim() for panel in panels]
    for panel in panels:
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _rows(results: Results) -> Any:
    """The gain against the number of rows, a line a ratio, and the paper's fit."""
    method = methods(results)[0]
    figure, [panels] = new_figure(2, width=4.8)
    counts = all_rows(results)
    for index, first in enumerate(at_rows(results, counts[0])):
        levels = [at_rows(results, rows)[index].name for rows in counts]
        found = [gain(results, f"{method} masked", f"{method} unmasked", name) for name in levels]
        shift = 1.03 ** (index - 0.5)
        _point(panels[0], index, [rows * shift for rows in counts], found, f"ratio {ratio(results, first.name):.1f}")
    _logarithmic(panels[0], counts)
    panels[0].set_xlabel("rows trained on")
    panels[0].set_ylabel("gain in test loss, nats a token")
    panels[0].set_title(f"{method}: masked − unmasked (above 0: unmasked better)", fontsize=9)
    line = np.geomspace(1000, 100_000, 50)
    panels[1].plot(line, 431.74 - 39.37 * np.log(line), "--", color="0.35", label="the paper's fit")
    _logarithmic(panels[1], [1000, 10_000, 100_000])
    panels[1].set_xticks([1000, 10_000, 100_000], ["1k", "10k", "100k"])
    panels[1].set_xlabel("rows trained on (near ratio 10)")
    panels[1].set_ylabel("relative gain in AlpacaEval 1.0, %")
    panels[1].set_title("Shi et al.: parts of Tülu v2, fitted at 1k to 35k rows", fontsize=9)
    panels[1].legend(frameon=False, fontsize=8)
    legend(figure, panels[0])
    return figure


def _epochs(results: Results) -> Any:
    """Losses on rows trained on (thin) and on test rows, masked and unmasked, a panel a level of the first method."""
    method = methods(results)[0]
    figure, panels = _grid(results)
    for panel, level in zip(panels, results.levels, strict=True):
        for index, loss in enumerate(("masked", "unmasked", "share")):
            arm = f"{method} {loss}"
            if arm not in results.arms_at(level):
                continue
            for metric, words, width in (("test_loss", "test", 2.0), ("trained_rows_loss", "rows trained on", 0.8)):
                by_step = _by_step(results, metric, arm, level)
                at = [_epoch(results, level, step) for step in by_step]
                mean = [one.mean for one in by_step.values()]
                look = style(index) | {"linewidth": width, "linestyle": "-" if width > 1 else ":"}
                panel.plot(at, mean, label=f"{loss}, {words}", **look)
                if width > 1 and all(one.half is not None for one in by_step.values()):
                    low, high = [one.low for one in by_step.values()], [one.high for one in by_step.values()]
                    panel.fill_between(at, low, high, color=look["color"], alpha=0.12, linewidth=0)
        panel.set_title(f"{method}, {level} (ratio {ratio(results, level):.1f})", fontsize=9)
        panel.set_xlabel("epoch")
        panel.set_ylabel("loss on answers, nats a token")
        _logarithmic(
            panel, [_epoch(results, level, step) for step in _by_step(results, "test_loss", f"{method} masked", level)]
        )
        panel.set_ylim(bottom=0)
    legend(figure, *panels, columns=3)
    return figure


def _grid(results: Results) -> tuple[Any, list[Any]]:
    """A panel a level, the ratios from left to right."""
    counts = all_rows(results)
    columns = len(results.levels) // len(counts)
    figure, panels = new_figure(columns, len(counts), width=4.8, height=3.4)
    return figure, list(panels.flat)


def _by_step(results: Results, metric: str, arm: str, level: str) -> dict[int, Interval]:
    found: dict[int, list[float]] = {}
    for curve in results.curves(metric, arm, level).values():
        for step, value in curve:
            found.setdefault(step, []).append(value)
    return {step: interval(values) for step, values in sorted(found.items()) if step}


def _epoch(results: Results, level: str, step: int) -> float:
    settings = next(one.settings for one in results.preset.levels if one.name == level)
    return step / float(settings["train.eval_every"])


def _rates(results: Results) -> Any:
    """How the rates were chosen."""
    figure, panels = _grid(results)
    for panel, level in zip(panels, results.levels, strict=True):
        draw_rates(panel, results, "validation_loss", level)
        panel.set_title(f"{level} (ratio {ratio(results, level):.1f})", fontsize=9)
        panel.set_ylabel("validation loss, best epoch")
    legend(figure, *panels)
    return figure
