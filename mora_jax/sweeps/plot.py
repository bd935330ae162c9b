"""The picture of a sweep: loss against the learning rate, or another swept number, with the best run marked."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from mora_jax.display.figures import legend, new_figure, style
from mora_jax.sweeps.grid import shown
from mora_jax.sweeps.run_result import RunResult

_RATE, _SEED = "optimizer.learning_rate", "seed"


def draw(every: Sequence[RunResult], best: RunResult | None, path: str | os.PathLike[str] | None = None) -> Any:
    """Draws a point a run, and a line through the means over seeds for each combination of the other keys.

    Args:
        every: the runs of the sweep.
        best: of them; None if none came to its end.
        path: where to write the picture; None for nowhere.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        InputError: matplotlib isn't installed, or `path` can't be written.
    """
    runs = [run for run in every if math.isfinite(run.score)]
    keys = _varied(every)
    along = _along(every, keys)
    places = _places(every, along)
    lines: dict[str, list[RunResult]] = {}
    for run in runs:
        rest = [f"{key.rpartition('.')[2]} {shown(_value(run, key))}" for key in keys if key not in (along, _SEED)]
        lines.setdefault(", ".join(rest), []).append(run)
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    handles: dict[str, Any] = {}
    for number, (label, members) in enumerate(lines.items()):
        by_place: dict[float, list[float]] = {}
        for run in members:
            by_place.setdefault(places[shown(_value(run, along))], []).append(run.score)
        middle = sorted((place, sum(losses) / len(losses)) for place, losses in by_place.items())
        handles |= dict.fromkeys([label], axes.plot(*zip(*middle, strict=True), **style(number))[0])
        if any(len(losses) > 1 for losses in by_place.values()):
            points = [(place, loss) for place, losses in by_place.items() for loss in losses]
            axes.plot(*zip(*points, strict=True), **style(number) | {"linestyle": "none"}, markersize=4, alpha=0.5)
    if best is not None:
        at = places[shown(_value(best, along))], best.score
        axes.plot(*at, "*", color="white", markeredgecolor="black", markersize=17, zorder=5)
        first, last = min(places.values()), max(places.values())
        side = "center" if first == last else {first: "left", last: "right"}.get(at[0], "center")
        below = {"xytext": (0, -20), "textcoords": "offset points", "ha": side, "va": "top", "fontsize": 8}
        axes.annotate(f"best: {best.name}", at, parse_math=False, **below)
    numeric = all(isinstance(_value(run, along), int | float) for run in every)
    if along == _RATE and numeric:
        axes.set_xscale("log")
    if not numeric or along != _RATE:
        axes.set_xticks(list(places.values()), list(places), parse_math=False)
    elif len(places) <= 8:
        axes.set_xticks(list(places.values()), list(places), parse_math=False)
        axes.set_xticks([], minor=True)
    axes.margins(y=0.2)
    axes.set_xlabel(along or "run")
    scored = any(run.summary.get("eval_loss") is not None for run in runs)
    axes.set_ylabel("loss on held-out answers, nats a token" if scored else "loss of the last step, nats a token")
    failed = [run for run in every if run.failed]
    if failed:
        names = ", ".join(run.name for run in failed)
        axes.set_title(f"left out, since they failed: {names}", fontsize=8, wrap=True, parse_math=False)
    if len(lines) > 1:
        legend(axes, handles)
    axes.grid(alpha=0.3)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _value(run: RunResult, key: str) -> Any:
    """What a run has for a key, whether or not its settings name it; of a value of a study's own what they say."""
    section, _, name = key.rpartition(".")
    place = getattr(run.config, section) if section and key not in run.values else run.config
    return run.values[key] if key in run.values else getattr(place, name, None)


def _along(runs: Sequence[RunResult], keys: list[str]) -> str:
    """The key along the horizontal axis: the learning rate, else a number, else what there is."""
    if _RATE in keys:
        return _RATE
    numbers = [key for key in keys if all(isinstance(_value(run, key), int | float) for run in runs)]
    others = [key for key in numbers if key != _SEED]
    return next(iter(others or numbers or keys), next(iter(runs[0].values), ""))


def _places(runs: Sequence[RunResult], along: str) -> dict[str, float]:
    """Where each value lies: a number at itself for the learning rate, others side by side."""
    values = list(dict.fromkeys(_value(run, along) for run in runs))
    if along == _RATE:
        return {shown(value): float(value) for value in values if value is not None}
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    return {shown(value): float(index) for index, value in enumerate(values)}


def _varied(runs: Sequence[RunResult]) -> list[str]:
    """The keys whose values differ among runs, in order."""
    keys = dict.fromkeys(key for run in runs for key in run.values)
    return [key for key in keys if len({shown(_value(run, key)) for run in runs}) > 1]
