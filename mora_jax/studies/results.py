"""The table of a study, one observation a line, and what is read from it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]  # datasets needs it

from mora_jax.studies.intervals import Interval, interval
from mora_jax.studies.study import CHOOSING, EXPLORATORY, REPORTED, Cell, Metric, Preset, Study
from mora_jax.sweeps.results import RunResult

FAILED, NOT_ENDED = "failed", "not ended"
PERTURBED = "perturbed weights"
#: (step, value) in the order of steps.
Curve = list[tuple[int, float]]


def observations(study: Study, preset: str, cells: Mapping[str, Cell], runs: Iterable[RunResult]) -> pd.DataFrame:
    """A row a measurement.

    Columns: study, preset, cell, config (the first digits of the SHA-256 of its configuration, where it writes left
    out), stage, level and the level's own values, arm, method, parameters, learning_rate, seed, step, metric, value,
    note, versions. A cell that failed or has not ended has one row, whose metric says so, whose note says why it
    failed, and whose value is empty; a value that is not finite is empty too, beside its step.
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
            "stage": cell.stage,
            "level": cell.level.name,
            **cell.level.values,
            "arm": cell.arm.name,
            "method": run.config.adapter.method,
            "parameters": run.summary.get("trainable_parameters"),
            "learning_rate": run.config.optimizer.learning_rate,
            "seed": cell.seed,
        }
        note = run.failed or (PERTURBED if cell.perturbed else None)
        measured = list(_measured(run)) if run.summary and not run.failed else []
        for step, metric, value in measured or [(None, FAILED if run.failed else NOT_ENDED, None)]:
            rows.append({**head, "step": step, "metric": metric, "value": value, "note": note, "versions": versions})
    return pd.DataFrame(rows)


def config_hash(run: RunResult) -> str:
    """Of what says what a run computes: its configuration, with the contents of data files in place of their paths."""
    values = {name: value for name, value in run.config.to_dict().items() if name not in ("out", "log")}
    values["model"]["path"] = Path(values["model"]["path"]).name
    for name in ("train", "eval"):
        files = map(Path, values["data"][name] or ())
        values["data"][name] = [
            hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(file) for file in files
        ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def _measured(run: RunResult) -> Iterator[tuple[int | None, str, float | None]]:
    for row in run.metrics:
        for name, value in row.items():
            metric = "train_loss" if name == "loss" else name.removeprefix("eval_")
            # A file of metrics holds null for what is not finite.
            if metric != name and metric != "tokens" and isinstance(value, int | float | None):
                yield row["step"], metric, math.nan if value is None else float(value)


class Results:
    """What conclusions and figures are made of.

    Args:
        frame: the observations.
        study: whose.
        preset: its size.
        perturbed: whether the reported values are those of cells that started from perturbed weights.

    Attributes:
        arms, levels: their names, in order; levels of which no cell ended are left out, beside others.
    """

    def __init__(self, frame: pd.DataFrame, study: Study, preset: Preset, *, perturbed: bool = False) -> None:
        self.frame, self.study, self.preset, self.perturbed = frame, study, preset, perturbed
        order = list(dict.fromkeys([*(arm.name for _, arm in preset.pairs()), *frame["arm"]]))
        self.arms = sorted(set(frame["arm"]), key=order.index)
        ended = frame[frame["metric"] != NOT_ENDED]
        self.levels = list(dict.fromkeys((frame if ended.empty else ended)["level"]))

    @classmethod
    def read(cls, file: Path, study: Study) -> Results:
        """From a file `cells.csv`; the preset has as many seeds as it reports."""
        frame = pd.read_csv(file, keep_default_na=False, na_values={"value": [""], "step": [""], "parameters": [""]})
        seeds = frame.loc[frame["stage"] == REPORTED, "seed"].nunique()
        return cls(frame, study, dataclasses.replace(study.presets[frame["preset"].iloc[0]], seeds=seeds))

    @functools.cached_property
    def _groups(self) -> dict[tuple[str, ...], pd.DataFrame]:
        """The rows by stage, arm and level, and by these and the metric."""
        stages = self.frame["stage"].mask(self.frame["note"] == PERTURBED, PERTURBED)
        columns = [stages, "arm", "level"]
        return {key: rows for by in (columns, [*columns, "metric"]) for key, rows in self.frame.groupby(by, sort=False)}

    def _where(self, stage: str, arm: str, level: str, *metric: str) -> pd.DataFrame:
        """The rows of an arm's cells, of one metric or of all."""
        stage = PERTURBED if self.perturbed and stage == REPORTED else stage
        return self._groups.get((stage, arm, level, *metric), self.frame.iloc[:0])

    def by_rate(
        self, metric: str, arm: str, level: str = "", stages: Iterable[str] = (CHOOSING, EXPLORATORY)
    ) -> dict[float, dict[int, Curve]]:
        """The (step, value) pairs of each seed by each learning rate; by default on the seeds that choose."""
        curves: dict[float, dict[int, Curve]] = {}
        for stage in stages:
            for (rate, seed), rows in self._where(stage, arm, level, metric).groupby(["learning_rate", "seed"]):
                pairs = sorted(zip(rows["step"], rows["value"], strict=True))
                curves.setdefault(rate, {})[int(seed)] = [(int(step), float(value)) for step, value in pairs]
        return dict(sorted(curves.items()))

    def curves(self, metric: str, arm: str, level: str = "", stage: str = REPORTED) -> dict[int, Curve]:
        """The (step, value) pairs of each seed, in order."""
        by_rate = self.by_rate(metric, arm, level, [stage])
        return dict(sorted(pair for curves in by_rate.values() for pair in curves.items()))

    def by_step(self, metric: str, arm: str, level: str = "") -> dict[int, Interval]:
        """The mean over reported seeds at each evaluation."""
        values: dict[int, list[float]] = {}
        for curve in self.curves(metric, arm, level).values():
            for step, value in curve:
                values.setdefault(step, []).append(value)
        return {step: interval(values[step]) for step in sorted(values)}

    def values(
        self, metric: Metric | str, arm: str, level: str = "", stage: str = REPORTED, *, share: float = 1.0
    ) -> dict[int, float]:
        """A metric by seed; NaN for seeds whose cell failed.

        Args:
            metric: whose value after the last step is taken, or that at the evaluation that it names.
            arm, level, stage: of the cells.
            share: of the steps, after which the value is taken where the metric names no evaluation.
        """
        metric = Metric(metric, metric) if isinstance(metric, str) else metric
        values = dict.fromkeys(map(int, self._where(stage, arm, level, FAILED)["seed"]), math.nan)
        guides = self.curves(metric.best_by, arm, level, stage) if metric.best_by else {}
        for seed, curve in self.curves(metric.name, arm, level, stage).items():
            steps = [step for step, _ in curve if step <= share * curve[-1][0] and (step or share == 1)]
            if metric.best_by:
                steps = [min(guides[seed], key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])[0]]
            if steps:
                values[seed] = dict(curve)[steps[-1]]
        return values

    def mean(self, metric: Metric | str, arm: str, level: str = "", *, share: float = 1.0) -> Interval:
        """Of `values`, over seeds."""
        return interval(self.values(metric, arm, level, share=share).values())

    def arms_at(self, level: str = "") -> list[str]:
        """The arms that are compared at a level."""
        there = set(self.frame[self.frame["level"] == level]["arm"])
        return [arm for arm in self.arms if arm in there]

    def pairs(self) -> list[tuple[str, str]]:
        """Every arm with each level at which it is compared."""
        return [(arm, level) for level in self.levels for arm in self.arms_at(level)]

    def has(self, metric: str) -> bool:
        """Whether it was measured."""
        return bool((self.frame["metric"] == metric).any())

    def parameters(self, arm: str) -> int | None:
        """How many numbers an arm trains; None where none of its cells has ended."""
        counts = pd.to_numeric(self.frame[self.frame["arm"] == arm]["parameters"]).dropna()
        return None if counts.empty else int(counts.iloc[0])

    def rate(self, arm: str, level: str = "") -> float | None:
        """The learning rate of the reported cells."""
        rows = self._where(REPORTED, arm, level)
        return None if rows.empty else float(rows["learning_rate"].iloc[0])

    def at_edge(self, arm: str, level: str = "") -> bool:
        """Whether the chosen rate is the lowest or highest that was tried."""
        rates = set(self._where(CHOOSING, arm, level)["learning_rate"])
        return len(rates) > 1 and self.rate(arm, level) in (min(rates), max(rates))

    def cells(self, arm: str, level: str = "", stage: str = REPORTED) -> list[str]:
        """The names of an arm's cells."""
        return list(dict.fromkeys(self._where(stage, arm, level)["cell"]))

    def missing(self) -> list[tuple[str, str]]:
        """The cells without a result, and why; a level without any as one."""
        rows = self.frame[self.frame["value"].isna() & self.frame["step"].isna()]
        there = rows["level"].isin(self.levels)
        triples = zip(*(rows[there][name] for name in ("cell", "metric", "note")), strict=True)
        cells = [(cell, f"{metric}: {note}" if metric == FAILED else metric) for cell, metric, note in triples]
        return [*cells, *((level, "no cell ended") for level in dict.fromkeys(rows[~there]["level"]))]
