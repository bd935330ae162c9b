"""Runs a study: chooses learning rates on one seed, trains the others, and writes what came of them."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mora_jax.errors import InputError
from mora_jax.paths import found_path
from mora_jax.studies.conclusion import write_conclusion
from mora_jax.studies.folder import StudyFolder
from mora_jax.studies.results import Results, choose_rates, observations
from mora_jax.studies.scoring import is_embedded
from mora_jax.studies.study import Arm, Cell, Level, Measuring, Preset, Sources, Study, choosing_cells, reported_cells
from mora_jax.sweeps.board import Board
from mora_jax.sweeps.grid import SweepRun
from mora_jax.sweeps.live_board import make_board
from mora_jax.sweeps.run_result import RunResult
from mora_jax.sweeps.train import train_runs
from mora_jax.training.config.load import check_together
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.display.plain import left_words
from mora_jax.training.run.directory import RunDirectory


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
    resume: bool = False,
    overwrite: bool = False,
    at_once: int | None = None,
    board: Board | None = None,
) -> StudyResult:
    """Runs a study, or what is not done of it, and writes `cells.csv`, `conclusion.md` and figures.

    Args:
        study: which.
        preset_name: one of its presets.
        out: its folder.
        sources: base model and data.
        cells: a regular expression: only cells are trained whose name it is found in.
        resume: there has to be one in the folder already; cells that failed are tried again.
        overwrite: replace what is in the folder.
        at_once: the most runs that train together, where memory is short; None for no limit.
        board: what is shown.

    Raises:
        InputError: anything the user has to mend.
    """
    preset = study.presets[preset_name]
    # The same study from any working directory.
    sources = Sources(
        found_path(sources.model),
        sources.data and tuple(map(found_path, sources.data)),
        sources.texts and found_path(sources.texts),
    )
    wanted, names = _pattern(cells), cell_names(preset)
    if wanted is not None and not any(wanted.search(name) for name in names):
        raise InputError(f"--cells {cells} fits no cell; they are called such as {names[0]} and {names[-1]}")
    folder = StudyFolder(out)
    asked = {
        "study": study.name,
        "preset": preset_name,
        "model": _place(sources.model),
        "data": sources.data and [_place(path) for path in sources.data],
        "texts": sources.texts and _place(sources.texts),
    }
    running = _Running(study, preset, folder, sources, make_board() if board is None else board, at_once)
    with folder.opened(asked, resume=resume, overwrite=overwrite):
        if resume:
            folder.forget_failures()
        choosing = list(choosing_cells(preset))
        running.begin(_cells_at_most(preset, wanted))
        runs = running.train(choosing, wanted)
        chosen = choose_rates(study, running.cells, runs)
        if not running.exit_code:
            runs += running.train(list(reported_cells(preset, chosen)), wanted)
        frame = observations(study, preset_name, running.cells, runs)
        results = Results(frame, study, preset)
        folder.write_text("cells.csv", frame.to_csv(index=False))
        figures: dict[str, Any] = {}
        if frame["value"].notna().any():
            try:
                figures = study.figures(results)
            except InputError as error:
                running.board.note(f"no figures: {error}")
        for name, figure in figures.items():
            folder.write_figure(name, figure)
        conclusion = write_conclusion(results, preset_name, sources, list(figures))
        folder.write_text("conclusion.md", conclusion)
    return StudyResult(results, conclusion, str(folder.path), running.exit_code)


def _place(text: str) -> str:
    """Where a file or folder lies, without links and `..`; a hub id as it is."""
    return os.path.realpath(text) if os.path.exists(text) else text


def _pattern(cells: str | None) -> re.Pattern[str] | None:
    if cells is None:
        return None
    try:
        return re.compile(cells)
    except re.error as error:
        raise InputError(f"--cells {cells} is no regular expression: {error}") from None


def cell_names(preset: Preset) -> list[str]:
    """The names of all cells that there can be: of the reported ones with each rate that may be chosen."""
    names = [cell.name for cell in choosing_cells(preset)]
    for level, arm in preset.pairs():
        for reported in _reported_names(preset, level, arm):
            names += reported
    return list(dict.fromkeys(names))


def _reported_names(preset: Preset, level: Level, arm: Arm) -> list[list[str]]:
    """The names of the reported cells of an arm at a level, for each rate that may be chosen."""
    of = arm.rate_of or arm.name
    rates = next(one.rates for place, one in preset.pairs() if (place, one.name) == (level, of))
    chosen = ({(level.name, of): rate} for rate in rates)
    return [
        [cell.name for cell in reported_cells(preset, one) if cell.arm is arm and cell.level is level] for one in chosen
    ]


def _cells_at_most(preset: Preset, wanted: re.Pattern[str] | None) -> int:
    """How many cells are trained, those counted whose name fits."""

    def fitting(names: Iterable[str]) -> int:
        return sum(wanted is None or wanted.search(name) is not None for name in names)

    reported = (max(map(fitting, _reported_names(preset, *pair)), default=0) for pair in preset.pairs())
    return fitting(cell.name for cell in choosing_cells(preset)) + sum(reported)


def cell_config(cell: Cell, preset: Preset, model: str, data: Mapping[str, Any], out: str) -> Config:
    """The configuration of a cell.

    Args:
        cell: which.
        preset: of the study.
        model: the base's folder.
        data: the keys that name the data.
        out: the cell's run directory.

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
        cells: those that were made so far, by name.
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
    ) -> None:
        self._study, self._preset, self._folder, self._sources = study, preset, folder, sources
        self.board, self._at_once = board, at_once
        self.cells: dict[str, Cell] = {}
        self.exit_code = 0
        self._data: dict[tuple[str, int], dict[str, Any]] = {}
        self._configs: dict[str, Config] = {}
        self._cache: dict[Any, Any] = {}
        self._all = self._before = self._there = 0
        self._first: tuple[float, float] | None = None

    def begin(self, every: int) -> None:
        """Sets the number of all cells, for the time left."""
        self._all = every
        self.board.whole = self._progress

    def train(self, cells: Sequence[Cell], wanted: re.Pattern[str] | None) -> list[RunResult]:
        """Trains cells that are not done; returns what came of all of them, of those that were not wanted too."""
        self.cells |= {cell.name: cell for cell in cells}
        runs = [self._run(cell) for cell in cells]
        self._configs |= {run.name: run.config for run in runs}
        taken = [run for run in runs if wanted is None or wanted.search(run.name)]
        done = [run for run in runs if _ended(run)]
        chosen = [*taken, *(run for run in done if run not in taken)]
        self._there += len(done)
        if not chosen:
            return [_not_run(run) for run in runs]
        result = train_runs(chosen, self._folder, self.board, at_once=self._at_once, measure=self._measure, go_on=True)
        self.exit_code = result.exit_code
        self._before += len(chosen)
        found = {run.name: run for run in result.runs}
        return [found.get(run.name) or _not_run(run) for run in runs]

    def _run(self, cell: Cell) -> SweepRun:
        out, data = str(self._folder.path / "runs" / cell.name), self._files(cell)
        rate = self._study.learning_rate(cell, data)
        config = cell_config(dataclasses.replace(cell, rate=rate), self._preset, self._sources.model, data, out)
        values = {**cell.level.values, "arm": cell.arm.name, "optimizer.learning_rate": rate, "seed": cell.seed}
        return SweepRun(cell.name, values, config)

    def _files(self, cell: Cell) -> dict[str, Any]:
        """The keys that name the data of a cell, which is written once for all arms."""
        key = cell.level.name, cell.seed
        if key not in self._data:
            made = self._study.write_data(self._preset, cell.level, cell.seed, self._folder.data, self._sources)
            self._data[key] = made
        return self._data[key]

    def _measure(self, name: str, tokenizer: Any, model: Any, step: int) -> dict[str, float]:
        cell, config = self.cells[name], self._configs[name]
        settings = Measuring(
            self._preset, self._sources, self._folder.data, self._files(cell), config.train.steps or 0, self._cache
        )
        return self._study.measure(cell, settings, tokenizer, model, step)

    def _progress(self) -> str:
        """How far the whole is: cells by the share of their steps that is done."""
        states = self.board.runs.values()
        done = sum(1.0 if one.words == "done" else one.step / one.steps if one.steps else 0.0 for one in states)
        done += self._before
        new, now = done - self._there, time.monotonic()
        words = f"  all {self._all} cells: {done / self._all:.0%}"
        if self._first is None:
            # What a stopped study did before is in it, and took no time now.
            self._first = new, now
        gained, seconds = new - self._first[0], now - self._first[1]
        return words if gained <= 0 else words + left_words({"seconds_left": seconds / gained * (self._all - done)})


def _ended(run: SweepRun) -> bool:
    return bool(RunDirectory(run.config.out or "").files.present(("summary.json",)))


def _not_run(run: SweepRun) -> RunResult:
    return RunResult(run.name, run.values, {}, [], None, run.config.out, run.config)
