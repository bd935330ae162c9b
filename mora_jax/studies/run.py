"""Runs a study: searches learning rates, trains the reported seeds, and writes what came of them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mora_jax.errors import InputError
from mora_jax.interop.load import load_pretrained
from mora_jax.interop.save import save_pretrained
from mora_jax.paths import found_path
from mora_jax.studies.claims import claims, to_json
from mora_jax.studies.conclusion import write_conclusion
from mora_jax.studies.figures import rates_figure
from mora_jax.studies.folder import StudyFolder
from mora_jax.studies.results import Results, observations
from mora_jax.studies.rows import is_embedded
from mora_jax.studies.search import GROWTH, search
from mora_jax.studies.study import (
    CHOOSING,
    CHOOSING_SEEDS,
    REPORTED,
    Arm,
    Cell,
    Level,
    Measuring,
    Preset,
    Sources,
    Study,
    reported_cells,
    rounded,
)
from mora_jax.sweeps.board import Board, make_board
from mora_jax.sweeps.grid import SweepRun
from mora_jax.sweeps.results import RunResult
from mora_jax.sweeps.train import train_runs
from mora_jax.training.config.load import check_together
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.display.plain import left_words
from mora_jax.training.run.directory import RunDirectory

#: Runs of an arm's search where its grid does not grow: three on a first seed, two on each of two others.
SEARCHED = 7


@dataclass(frozen=True)
class StudyResult:
    """What came of a study.

    Attributes:
        results: its table.
        conclusion: in Markdown.
        out: its folder.
        exit_code: 0, or what a shell expects after the signal that stopped it.
    """

    results: Results
    conclusion: str
    out: str
    exit_code: int


def run_study(
    study: Study,
    preset_name: str,
    out: str,
    sources: Sources,
    *,
    cells: str | None = None,
    seeds: int | None = None,
    robust: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    at_once: int | None = None,
    board: Board | None = None,
) -> StudyResult:
    """Runs a study, or what is not done of it, and writes `cells.csv`, `claims.json`, `conclusion.md` and figures.

    Args:
        study: which.
        preset_name: one of its presets.
        out: its folder.
        sources: base model and data.
        cells: a regular expression: only cells are trained whose name it is found in.
        seeds: how many are reported; None for as many as the preset says.
        robust: run what is reported once more from perturbed weights.
        resume: there has to be one in the folder already; cells that failed are tried again.
        overwrite: replace what is in the folder.
        at_once: the most runs that train together, where memory is short; None for no limit.
        board: what is shown.

    Raises:
        InputError: anything the user has to mend.
    """
    preset = study.presets[preset_name]
    preset = dataclasses.replace(preset, seeds=seeds or preset.seeds)
    # The same study from any working directory.
    sources = Sources(
        found_path(sources.model),
        sources.data and tuple(map(found_path, sources.data)),
        sources.texts and found_path(sources.texts),
    )
    study.check(preset, sources)
    pattern = _pattern(cells, preset)
    folder = StudyFolder(out)
    asked = {
        "study": study.name,
        "preset": preset_name,
        "model": _place(sources.model),
        "data": sources.data and [_place(path) for path in sources.data],
        "texts": sources.texts and _place(sources.texts),
    }
    running = _Running(study, preset, folder, sources, make_board() if board is None else board, at_once, pattern)
    with folder.opened(asked, resume=resume, overwrite=overwrite):
        if resume:
            folder.forget_failures()
        running.train_all(robust)
        frame = observations(study, preset_name, running.cells, running.runs.values())
        results = Results(frame, study, preset)
        stated = claims(results)
        folder.write_text("cells.csv", frame.to_csv(index=False))
        folder.write_text("claims.json", to_json(stated))
        figures: dict[str, Any] = {}
        if frame["value"].notna().any():
            try:
                figures = {**study.figures(results), "rates": rates_figure(results)}
            except InputError as error:
                running.board.note(f"no figures: {error}")
        for name, figure in figures.items():
            folder.write_figure(name, figure)
        conclusion = write_conclusion(results, stated, preset_name, sources, list(figures))
        folder.write_text("conclusion.md", conclusion)
    return StudyResult(results, conclusion, str(folder.path), running.exit_code)


def _place(text: str) -> str:
    """Where a file or folder lies, without links and `..`; a hub id as it is."""
    return os.path.realpath(text) if os.path.exists(text) else text


def _pattern(cells: str | None, preset: Preset) -> re.Pattern[str]:
    try:
        pattern = re.compile(cells or "")
    except re.error as error:
        raise InputError(f"--cells {cells} is no regular expression: {error}") from None
    names = cell_names(preset)
    if not any(pattern.search(name) for name in (*names, *cell_names(preset, grown=True))):
        raise InputError(f"--cells {cells} fits no cell; they are called such as {names[0]} and {names[-1]}")
    return pattern


def cell_names(preset: Preset, *, grown: bool = False) -> list[str]:
    """The names of cells: of reported ones with each rate that may be chosen.

    Args:
        preset: of a study.
        grown: whether grids have grown as far as they can; else they are as they begin.
    """
    cells = list[Cell]()
    for level, arm in preset.pairs():
        of = arm.rate_of or arm.name
        rates = next(one.rates for place, one in preset.pairs() if (place, one.name) == (level, of))
        if grown and len(rates) > 1:
            factor = rates[1] / rates[0]
            rates = tuple(rounded(rates[0] * factor**power) for power in range(-GROWTH, len(rates) + GROWTH))
        if len(arm.rates) > 1:
            cells += [Cell(level, arm, rate, CHOOSING_SEEDS[0], CHOOSING) for rate in rates]
        for rate in rates:
            one_arm = dataclasses.replace(preset, levels=(dataclasses.replace(level, arms=(arm,)),))
            cells += reported_cells(one_arm, {(level.name, of): rate})
    return list(dict.fromkeys(cell.name for cell in cells))


def cell_config(
    cell: Cell, preset: Preset, model: str, data: Mapping[str, Any], out: str, changes: Mapping[str, Any] | None = None
) -> Config:
    """The configuration of a cell.

    Args:
        cell: which.
        preset: of the study.
        model: the base's folder.
        data: the keys that name the data.
        out: the cell's run directory.
        changes: keys that the study sets for the cell.

    Raises:
        InputError: settings that don't go together.
    """
    # The default dtype is the machine's; studies of the embedded model give the same everywhere.
    embedded = {"model.dtype": "float32"} if is_embedded(model) else {}
    settings = {
        "model.path": model,
        **embedded,
        "seed": cell.seed,
        "mesh.data": 1,
        "train.eval_on_start": True,
        **preset.settings,
        **cell.level.settings,
        **data,
        **cell.arm.settings,
        **(changes or {}),
        "optimizer.learning_rate": cell.rate,
        "out": out,
    }
    try:
        config = lay_over(Config(), [(name, value, name) for name, value in settings.items()])
        check_together(config)
    except InputError as error:
        raise InputError(f"{cell.name}: {error}") from None
    return config


class _Running:
    """A study under way.

    Attributes:
        cells, runs: those that were looked at so far, by name.
        exit_code: 0, or that after a signal.
    """

    def __init__(
        self,
        study: Study,
        preset: Preset,
        folder: StudyFolder,
        sources: Sources,
        board: Board,
        at_once: int | None,
        pattern: re.Pattern[str],
    ) -> None:
        self._study, self._preset, self._folder, self._sources = study, preset, folder, sources
        self.board, self._at_once, self._pattern = board, at_once, pattern
        self.cells: dict[str, Cell] = {}
        self.runs: dict[str, RunResult] = {}
        self.exit_code = 0
        self._data: dict[tuple[str, int], dict[str, Any]] = {}
        self._configs: dict[str, Config] = {}
        self._cache: dict[Any, Any] = {}
        self._expected = self._before = self._there = 0
        self._first: tuple[float, float] | None = None

    def train_all(self, robust: bool) -> None:
        """Searches rates, then trains what is reported and what the study explores."""
        pairs = list(self._preset.pairs())
        guess = {(level.name, arm.name): arm.rates[0] for level, arm in pairs if arm.rates}
        self._expected = SEARCHED * sum(len(arm.rates) > 1 for _, arm in pairs)
        self._expected += len(list(reported_cells(self._preset, guess, perturbed=robust)))
        self.board.whole = self._progress
        chosen: dict[tuple[str, str], float] = {}
        while True:
            wanted = list[Cell]()
            for level, arm in pairs:
                if len(arm.rates) > 1:
                    state = search(arm.rates, self._losses(level, arm))
                    wanted += [Cell(level, arm, rate, seed, CHOOSING) for rate, seed in state.wanted]
                    if state.rate is not None:
                        chosen[level.name, arm.name] = state.rate
            if not self._train(wanted):
                break
        self._train(list(reported_cells(self._preset, chosen, perturbed=robust)))
        while not self.exit_code and self._train(list(self._study.explore(self._results()))):
            pass

    def _results(self) -> Results:
        frame = observations(self._study, "", self.cells, self.runs.values())
        return Results(frame, self._study, self._preset)

    def _losses(self, level: Level, arm: Arm) -> dict[float, dict[int, float]]:
        """What a search goes by, of an arm's runs that are over: lower is better, infinite where a run diverged."""
        losses: dict[float, dict[int, float]] = {}
        for name, cell in self.cells.items():
            run = self.runs[name]
            if (cell.level, cell.arm, cell.stage) == (level, arm, CHOOSING) and (run.summary or run.failed):
                losses.setdefault(cell.rate, {})[cell.seed] = guide(self._study, run)
        return losses

    def _train(self, cells: Sequence[Cell]) -> bool:
        """Trains cells that are not done; returns whether there were any, and none was left undone."""
        new = {cell.name: cell for cell in cells if cell.name not in self.cells}
        if self.exit_code or not new:
            return False
        runs = {name: self._run(cell) for name, cell in new.items()}
        self.cells |= new
        self._configs |= {name: run.config for name, run in runs.items()}
        done = [name for name, run in runs.items() if _ended(run)]
        taken = [run for name, run in runs.items() if name in done or self._pattern.search(name)]
        self._there += len(done)
        self.runs |= {
            name: RunResult(name, run.values, {}, [], None, run.config.out, run.config) for name, run in runs.items()
        }
        if taken:
            result = train_runs(
                taken, self._folder, self.board, at_once=self._at_once, measure=self._measure, go_on=True
            )
            self.exit_code = result.exit_code
            self._before += len(taken)
            self.runs |= {run.name: run for run in result.runs}
        return any(self.runs[name].summary or self.runs[name].failed for name in new)

    def _run(self, cell: Cell) -> SweepRun:
        out, data = str(self._folder.path / "runs" / cell.name), self._files(cell)
        rate = self._study.learning_rate(cell, data)
        changes = self._study.settings(cell, self._preset)
        if cell.perturbed:
            changes |= self._perturbed_model()
        cell_at_rate = dataclasses.replace(cell, rate=rate)
        config = cell_config(cell_at_rate, self._preset, self._sources.model, data, out, changes)
        values = {**cell.level.values, "arm": cell.arm.name, "optimizer.learning_rate": rate, "seed": cell.seed}
        return SweepRun(cell.name, values, config)

    def _perturbed_model(self) -> dict[str, Any]:
        """The keys of a base with noise in its weights, which is written once."""
        out = self._folder.data / "perturbed_model"
        if not (out / "config.json").exists():
            perturb(self._sources.model, out, self._preset.settings.get("model.dtype"))
        return {"model.path": str(out)}

    def _files(self, cell: Cell) -> dict[str, Any]:
        """The keys that name the data of a cell, which is written once for all arms."""
        key = cell.level.name, cell.seed
        if key not in self._data:
            keys = self._study.write_data(self._preset, cell.level, cell.seed, self._folder.data, self._sources)
            self._data[key] = keys
        return self._data[key]

    def _measure(self, name: str, tokenizer: Any, model: Any, step: int) -> dict[str, float]:
        cell, steps = self.cells[name], self._configs[name].train.steps or 0
        items = None
        if step == steps and cell.stage == REPORTED:
            self._folder.items.mkdir(exist_ok=True)
            items = self._folder.items / f"{name}.jsonl"
            items.unlink(missing_ok=True)
        settings = Measuring(
            self._preset, self._sources, self._folder.data, self._files(cell), steps, self._cache, items
        )
        return self._study.measure(cell, settings, tokenizer, model, step)

    def _progress(self) -> str:
        """How far the study is: cells by the share of their steps that is done."""
        states = self.board.runs.values()
        done = sum(1.0 if one.words == "done" else one.step / one.steps if one.steps else 0.0 for one in states)
        done += self._before
        expected = max(self._expected, len(self.cells))
        new, now = done - self._there, time.monotonic()
        text = f"  all {expected} cells or more: {done / expected:.0%}"
        if self._first is None:
            # What a stopped study did before is in it, and took no time now.
            self._first = new, now
        gained, seconds = new - self._first[0], now - self._first[1]
        return text if gained <= 0 else text + left_words({"seconds_left": seconds / gained * (expected - done)})


def guide(study: Study, run: RunResult) -> float:
    """What a learning rate is chosen by: lower is better, infinite for a run that diverged or failed."""
    name, sign = f"eval_{study.chosen_by}", -1 if study.higher else 1
    evaluations = [row[name] for row in run.metrics if name in row]
    values = [sign * value for value in evaluations if value is not None and math.isfinite(value)]
    if run.failed or not values or evaluations[-1] is None or not math.isfinite(evaluations[-1]):
        return math.inf
    return min(values) if study.chosen_at_best else values[-1]


def perturb(model: str, out: Path, dtype: str | None) -> None:
    """Writes a model whose weights have noise of one bfloat16 step: w (1 + u / 256), u uniform in [-1/2, 1/2]."""
    base, tokenizer = load_pretrained(model, dtype="float32" if is_embedded(model) else dtype)
    draw = np.random.default_rng(0)
    state = nnx.state(base, nnx.Param)
    noisy = jax.tree.map(lambda w: w * (1 + (draw.random(w.shape, np.float32) - 0.5) / 256).astype(w.dtype), state)
    nnx.update(base, noisy)
    save_pretrained(base, out, tokenizer=tokenizer)


def _ended(run: SweepRun) -> bool:
    return bool(RunDirectory(run.config.out or "").files.present(("summary.json",)))
