"""What came of a sweep: a row a run, the best of them, as a table, a CSV file and a plot."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mora_jax.display.figures import legend, new_figure, style, write_figure
from mora_jax.display.tables import as_text, table
from mora_jax.models.decoder import Decoder
from mora_jax.sweeps.grid import shown
from mora_jax.training.config.schema import Config

#: Said where no run is the best.
INCOMPARABLE = "the losses are of different data or objectives: they don't compare"
_SCORES = ("final_loss", "eval_loss", "eval_perplexity")


@dataclass
class RunResult:
    """One run of a sweep.

    Attributes:
        name: of the run, and of its folder.
        values: of the swept keys.
        summary: what its `summary.json` holds; empty for a run that failed or was stopped.
        metrics: the rows of its `metrics.jsonl`.
        failed: why it ended before its last step; None for a run that didn't.
        out: its run directory; None where nothing was written.
        model: as trained, where nothing was written; else None (`mora_jax.load_adapter` reads `out`).
        config: its whole configuration.
    """

    name: str
    values: Mapping[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]] = field(repr=False)
    failed: str | None
    out: str | None
    config: Config = field(repr=False)
    model: Decoder | None = field(default=None, repr=False)

    @property
    def score(self) -> float:
        """What runs are compared by, lower is better: the evaluation loss, or without one the loss of the last step;
        NaN for a run that did not come to its end."""
        loss = self.summary.get("eval_loss")
        loss = self.summary.get("final_loss") if loss is None else loss
        return math.nan if loss is None or self.failed else loss

    @property
    def scored_on(self) -> object:
        """What `score` is of: scores of runs compare where these are equal."""
        if self.summary.get("eval_loss") is not None:
            return self.summary.get("eval_data")
        return self.config.data, self.config.loss


@dataclass
class SweepResult:
    """What `sweep` gives back.

    Attributes:
        runs: in the order of the grid.
        out: the sweep's folder; None where nothing was written.
        exit_code: 0, or what a shell expects after the signal that stopped the sweep before its end.
    """

    runs: list[RunResult]
    out: str | None
    exit_code: int = 0

    @property
    def best(self) -> RunResult | None:
        """The run with the lowest `score`; None if none came to its end, or the scores don't compare."""
        ended = [run for run in self.runs if math.isfinite(run.score)]
        return min(ended, key=lambda run: run.score, default=None) if self.comparable else None

    @property
    def comparable(self) -> bool:
        """Whether the scores of all runs that came to their end are of the same data and loss."""
        return len({run.scored_on for run in self.runs if math.isfinite(run.score)}) <= 1

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dictionary a run: `run`, the swept keys, `final_loss`, `eval_loss`, `eval_perplexity` (None where there is
        none, NaN for a run whose loss was not finite), `best`: `pandas.DataFrame(result.rows)`."""
        best = self.best
        return [
            {"run": run.name, **run.values}
            | {name: math.nan if run.failed and name == "final_loss" else run.summary.get(name) for name in _SCORES}
            | {"best": run is best}
            for run in self.runs
        ]

    def csv(self) -> str:
        """`rows` as CSV, with empty cells for None."""
        text = io.StringIO()
        rows = self.rows
        heads = list(dict.fromkeys(name for row in rows for name in row if name not in ("best", *_SCORES)))
        writer = csv.DictWriter(text, [*heads, *_SCORES, "best"], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})
        return text.getvalue()

    def table(self) -> str:
        """`rows` for people: the best is marked with a star, and a run that did not end says why."""
        heads = ("", "run", "final loss", "eval loss", "perplexity", "")
        lines = []
        for run, row in zip(self.runs, self.rows, strict=True):
            numbers = ["-" if row[name] is None else f"{row[name]:.4f}" for name in _SCORES]
            why = run.failed or ("" if run.summary else "not ended")
            lines.append(("*" if row["best"] else "", run.name, *numbers, why))
        text = as_text(table(heads, lines, words=(0, 1, 5)))
        return text if self.comparable else f"{text}\n{INCOMPARABLE}"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the losses of the runs against the swept number, the best one marked.

        Args:
            path: where to write the picture, if anywhere; the ending says the format.

        Returns:
            A `matplotlib.figure.Figure`, which a notebook shows.

        Raises:
            InputError: matplotlib isn't installed, or `path` can't be written.
        """
        return draw(self.runs, self.best, path)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else shown(value)


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
    all_keys = dict.fromkeys(key for run in every for key in run.values)
    keys = [key for key in all_keys if len({shown(_value(run, key)) for run in every}) > 1]
    along = _along(every, keys)
    values = list(dict.fromkeys(_value(run, along) for run in every))
    numeric = all(isinstance(value, int | float) for value in values)
    # A learning rate lies at itself, other values side by side.
    if along == _RATE:
        places = {shown(value): float(value) for value in values if value is not None}
    else:
        places = {shown(value): float(index) for index, value in enumerate(sorted(values) if numeric else values)}
    lines: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        rest = [f"{key.rpartition('.')[2]} {shown(_value(run, key))}" for key in keys if key not in (along, _SEED)]
        by_place = lines.setdefault(", ".join(rest), {})
        by_place.setdefault(places[shown(_value(run, along))], []).append(run.score)
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    handles: dict[str, Any] = {}
    for number, (label, by_place) in enumerate(lines.items()):
        means = sorted((place, sum(losses) / len(losses)) for place, losses in by_place.items())
        [handles[label]] = axes.plot(*zip(*means, strict=True), **style(number))
        if any(len(losses) > 1 for losses in by_place.values()):
            points = [(place, loss) for place, losses in by_place.items() for loss in losses]
            axes.plot(*zip(*points, strict=True), **style(number) | {"linestyle": "none"}, markersize=4, alpha=0.5)
    if best is not None:
        _mark_best(axes, best, places[shown(_value(best, along))], list(places.values()))
    if along == _RATE and numeric:
        axes.set_xscale("log")
    if along != _RATE or not numeric or len(places) <= 8:
        axes.set_xticks(list(places.values()), list(places), parse_math=False)
        axes.set_xticks([], minor=True)
    axes.margins(y=0.2)
    axes.set_xlabel(along or "run")
    scored = any(run.summary.get("eval_loss") is not None for run in runs)
    unit = "" if any(run.config.loss.preference for run in runs) else ", nats a token"
    axes.set_ylabel(f"loss on held-out answers{unit}" if scored else f"loss of the last step{unit}")
    if failed := ", ".join(run.name for run in every if run.failed):
        axes.set_title(f"left out, since they failed: {failed}", fontsize=8, wrap=True, parse_math=False)
    if len(lines) > 1:
        legend(axes, handles)
    axes.grid(alpha=0.3)
    if path is not None:
        write_figure(figure, path, dpi=130)
    return figure


def _mark_best(axes: Any, best: RunResult, place: float, places: Sequence[float]) -> None:
    """A star with the run's name below it, turned inwards where it lies at a side."""
    axes.plot(place, best.score, "*", color="white", markeredgecolor="black", markersize=17, zorder=5)
    first, last = min(places), max(places)
    side = "center" if first == last else {first: "left", last: "right"}.get(place, "center")
    below = {"xytext": (0, -20), "textcoords": "offset points", "ha": side, "va": "top", "fontsize": 8}
    axes.annotate(f"best: {best.name}", (place, best.score), parse_math=False, **below)


def _value(run: RunResult, key: str) -> Any:
    """What a run has for a key, whether or not its settings name it; of a value of a study's own what they say."""
    if key in run.values:
        return run.values[key]
    section, _, name = key.rpartition(".")
    return getattr(getattr(run.config, section) if section else run.config, name, None)


def _along(runs: Sequence[RunResult], keys: list[str]) -> str:
    """The key along the horizontal axis: the learning rate, else a number, else what there is."""
    if _RATE in keys:
        return _RATE
    numbers = [key for key in keys if all(isinstance(_value(run, key), int | float) for run in runs)]
    others = [key for key in numbers if key != _SEED]
    return next(iter(others or numbers or keys), next(iter(runs[0].values), ""))
