"""The table of a study, one observation a line, and what is read from it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]  # datasets needs it

from mora_jax.studies.intervals import Interval, interval, paired
from mora_jax.studies.study import Cell, Preset, Study
from mora_jax.sweeps.run_result import RunResult

#: Rows of an evaluation that are no measurement of the model.
_NOT_METRICS = ("eval_tokens",)
CHOOSING, REPORTED, NEIGHBOUR = "choosing", "reported", "neighbour"
FAILED = "failed"


def observations(study: Study, preset: str, cells: Mapping[str, Cell], runs: Iterable[RunResult]) -> pd.DataFrame:
    """A row a measurement.

    Columns: study, preset, cell, config (the first digits of the SHA-256 of its configuration, where it writes left
    out), stage, level and the level's own values, arm, method, parameters, learning_rate, seed, step, metric, value,
    note, versions. A cell that failed or has not ended has one row, whose metric says so, whose note says why it
    failed, and whose value is empty.
    """
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mora-jax", "jax", "flax", "optax"))
    rows: list[dict[str, Any]] = []
    for run in runs:
        cell = cells[run.name]
        head = {
            "study": study.name,
            "preset": preset,
            "cell": run.name,
            "config": config_hash(run),
            "stage": CHOOSING if cell.chooses else NEIGHBOUR if cell.neighbour else REPORTED,
            "level": cell.level.name,
            **cell.level.values,
            "arm": cell.arm.name,
            "method": run.config.adapter.method,
            "parameters": run.summary.get("trainable_parameters"),
            "learning_rate": run.config.optimizer.learning_rate,
            "seed": cell.seed,
        }
        found: list[tuple[int | None, str, float | None]] = []
        if run.summary and not run.failed:
            found += _measured(run)
        for step, metric, value in found or [(None, FAILED if run.failed else "not ended", None)]:
            rows.append(
                {**head, "step": step, "metric": metric, "value": value, "note": run.failed, "versions": versions}
            )
    return pd.DataFrame(rows)


def config_hash(run: RunResult) -> str:
    """Of what says what a run computes: its configuration, with the contents of data files in place of their paths."""
    said = {name: value for name, value in run.config.to_dict().items() if name not in ("out", "log")}
    said["model"]["path"] = Path(said["model"]["path"]).name
    for name in ("train", "eval"):
        said["data"][name] = [_content(path) for path in said["data"][name] or ()]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:10]


def _content(path: str) -> str:
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else path


def _measured(run: RunResult) -> Iterable[tuple[int, str, float]]:
    for row in run.metrics:
        for name, value in row.items():
            # A file of metrics holds null for what is not finite.
            number = math.nan if value is None else value
            scored = name.startswith("eval_") and name not in _NOT_METRICS
            if scored and isinstance(number, int | float):
                yield row["step"], name.removeprefix("eval_"), float(number)
            elif name == "loss":
                yield row["step"], "train_loss", float(number)


class Results:
    """What conclusions and figures are made of.

    Args:
        frame: the observations.
        study: whose.
        preset: its size.

    Attributes:
        frame: all observations.
    """

    def __init__(self, frame: pd.DataFrame, study: Study, preset: Preset) -> None:
        self.frame, self.study, self.preset = frame, study, preset
        self.arms = list(dict.fromkeys(arm.name for _, arm in preset.pairs()))
        self.levels = [level.name for level in preset.levels]

    def _of(self, metric: str, stage: str, **where: Any) -> pd.DataFrame:
        frame = self.frame
        chosen = (frame["metric"] == metric) & (frame["stage"] == stage)
        for name, value in where.items():
            chosen &= frame[name] == value
        return frame[chosen]

    def last(self, metric: str, arm: str, level: str = "") -> dict[int, float]:
        """The value after the last step, by seed."""
        return {seed: rows[-1][1] for seed, rows in self.curves(metric, arm, level).items()}

    def curves(self, metric: str, arm: str, level: str = "") -> dict[int, list[tuple[int, float]]]:
        """The (step, value) pairs of each reported seed, in order."""
        return self._curves(self._of(metric, REPORTED, arm=arm, level=level), "seed")

    def curves_by_rate(self, metric: str, arm: str, level: str = "") -> dict[float, list[tuple[int, float]]]:
        """The (step, value) pairs of each learning rate that was tried, on the seed that chooses."""
        return self._curves(self._of(metric, CHOOSING, arm=arm, level=level), "learning_rate")

    def by_rate(self, metric: str, arm: str, level: str = "") -> dict[int, dict[float, float]]:
        """The value after the last step of each reported seed by the learning rate: the chosen one and those beside it.

        Those beside it are there for levels with `neighbours`.
        """
        found: dict[int, dict[float, float]] = {}
        for stage in (REPORTED, NEIGHBOUR):
            for (seed, rate), rows in self._of(metric, stage, arm=arm, level=level).groupby(["seed", "learning_rate"]):
                found.setdefault(seed, {})[rate] = float(rows.sort_values("step")["value"].iloc[-1])
        return found

    def arms_at(self, level: str = "") -> list[str]:
        """The arms that are compared at a level."""
        return [arm.name for one, arm in self.preset.pairs() if one.name == level]

    @staticmethod
    def _curves(frame: pd.DataFrame, by: str) -> dict[Any, list[tuple[int, float]]]:
        return {
            key: [(int(step), float(value)) for step, value in sorted(zip(rows["step"], rows["value"], strict=True))]
            for key, rows in frame.groupby(by)
        }

    def best(self, metric: str, by: str, arm: str, level: str = "") -> dict[int, float]:
        """The value at the evaluation where `by` is lowest, by seed; the first where several are."""
        found = {}
        guides = self.curves(by, arm, level)
        for seed, rows in self.curves(metric, arm, level).items():
            step = min(guides[seed], key=lambda pair: pair[1])[0]
            found[seed] = dict(rows)[step]
        return found

    def mean(self, metric: str, arm: str, level: str = "") -> Interval:
        """Over seeds, after the last step."""
        return interval(self.last(metric, arm, level).values())

    def difference(self, metric: str, first: str, second: str, level: str = "") -> Interval:
        """The first arm minus the second, paired by seed, after the last step."""
        return paired(self.last(metric, first, level), self.last(metric, second, level))

    def parameters(self, arm: str) -> int | None:
        """How many numbers an arm trains; None where none of its cells has ended."""
        found = self.frame[self.frame["arm"] == arm]["parameters"].dropna()
        return None if found.empty else int(found.iloc[0])

    def rate(self, arm: str, level: str = "") -> float | None:
        """The learning rate of the reported cells."""
        frame = self.frame
        rows = frame[(frame["arm"] == arm) & (frame["level"] == level) & (frame["stage"] == REPORTED)]
        return None if rows.empty else float(rows["learning_rate"].iloc[0])

    def at_edge(self, arm: str, level: str = "") -> bool:
        """Whether the chosen rate is the lowest or highest that was tried."""
        rates = next(two.rates for one, two in self.preset.pairs() if (one.name, two.name) == (level, arm))
        return len(rates) > 1 and self.rate(arm, level) in (min(rates), max(rates))

    def missing(self) -> list[tuple[str, str]]:
        """The cells without a result, and why."""
        frame = self.frame[self.frame["value"].isna() & self.frame["step"].isna()]
        pairs = zip(frame["cell"], frame["metric"], frame["note"], strict=True)
        return [(cell, f"{metric}: {note}" if metric == FAILED else metric) for cell, metric, note in pairs]


def choose_rates(study: Study, cells: Mapping[str, Cell], runs: Iterable[RunResult]) -> dict[tuple[str, str], float]:
    """The learning rate of each (level, arm): the one with the best value of `study.chosen_by` after its last step.

    Where `study.chosen_at_best`, the best evaluation of a rate counts in place of its last.
    Pairs of which no run has come to its end are left out.
    """
    sign = -1 if study.higher else 1
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for run in runs:
        cell = cells[run.name]
        evaluations = [row[f"eval_{study.chosen_by}"] for row in run.metrics if f"eval_{study.chosen_by}" in row]
        values = [sign * value for value in evaluations if value is not None and math.isfinite(value)]
        # A rate whose run ended with a loss that is not finite is not taken.
        if not run.summary or run.failed or not values or evaluations[-1] is None or not math.isfinite(evaluations[-1]):
            continue
        found = min(values) if study.chosen_at_best else values[-1], cell.rate
        key = cell.level.name, cell.arm.name
        best[key] = min(best.get(key, found), found)
    return {key: rate for key, (_, rate) in best.items()}
