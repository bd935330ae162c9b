"""Runs a study: searches learning rates, trains the reported seeds, and writes what came of them.

A new study is a file, a template in `text/` and its name in `STUDIES`.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mora_jax.errors import InputError
from mora_jax.interop import load_pretrained, save_pretrained
from mora_jax.paths import found_path
from mora_jax.studies import cells as planned, forget, instruct, memorize, rates
from mora_jax.studies.claims import claims, to_json
from mora_jax.studies.conclusion import write_conclusion
from mora_jax.studies.figures import rates_figure
from mora_jax.studies.folder import StudyFolder
from mora_jax.studies.results import Results, observations
from mora_jax.studies.rows import is_embedded
from mora_jax.studies.study import CHOOSING, REPORTED, Arm, Cell, Evaluation, Level, Preset, Sources, Study
from mora_jax.sweeps.board import Board, make_board
from mora_jax.sweeps.grid import SweepRun
from mora_jax.sweeps.results import RunResult
from mora_jax.sweeps.train import train_runs
from mora_jax.training.display import left_words
from mora_jax.training.run.directory import RunDirectory

#: By name.
STUDIES: dict[str, Study] = {
    study.name: study for study in (memorize.Memorize(), forget.Forget(), instruct.Instruct(), rates.Rates())
}


@dataclass(frozen=True)
class StudyResult:
    """What came of a study.

    Attributes:
        results: its table.
        conclusion: in Markdown.
        exit_code: 0, or what a shell expects after the signal that stopped it.
    """

    results: Results
    conclusion: str
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
        results = running.results(preset_name)
        stated = claims(results)
        folder.files.write("cells.csv", results.frame.to_csv(index=False))
        folder.files.write("claims.json", to_json(stated))
        figures: dict[str, Any] = {}
        if results.frame["value"].notna().any():
            try:
                figures = {**study.figures(results), "rates": rates_figure(results)}
            except InputError as error:
                running.board.note(f"no figures: {error}")
        for name, figure in figures.items():
            folder.write_figure(name, figure)
        conclusion = write_conclusion(results, stated, preset_name, sources, figures)
        folder.files.write("conclusion.md", conclusion)
    return StudyResult(results, conclusion, running.exit_code)


def _place(text: str) -> str:
    """Where a file or folder lies, without links and `..`; a hub id as it is."""
    return os.path.realpath(text) if os.path.exists(text) else text


def _pattern(cells: str | None, preset: Preset) -> re.Pattern[str]:
    try:
        pattern = re.compile(cells or "")
    except re.error as error:
        raise InputError(f"--cells {cells} is no regular expression: {error}") from None
    names = planned.cell_names(preset)
    if not any(pattern.search(name) for name in (*names, *planned.cell_names(preset, grown=True))):
        raise InputError(f"--cells {cells} fits no cell; they are called such as {names[0]} and {names[-1]}")
    return pattern


@dataclass
class _Running:
    """A study under way.

    Attributes:
        pattern: only cells are trained in whose name it is found.
        cells, runs: those that were looked at so far, by name.
        exit_code: 0, or that after a signal.
    """

    study: Study
    preset: Preset
    folder: StudyFolder
    sources: Sources
    board: Board
    at_once: int | None
    pattern: re.Pattern[str]
    cells: dict[str, Cell] = field(default_factory=dict)
    runs: dict[str, RunResult] = field(default_factory=dict)
    exit_code: int = 0

    def train_all(self, robust: bool) -> None:
        """Searches rates, then trains what is reported and what the study explores."""
        self._data: dict[tuple[str, int], dict[str, Any]] = {}
        self._cache: dict[Any, Any] = {}
        searches = [(level, arm) for level, arm in self.preset.pairs() if len(arm.rates) > 1]
        reported = list(planned.reported_cells(self.preset, planned.first_rates(self.preset), perturbed=robust))
        self._progress = _Progress(self.board, planned.SEARCHED * len(searches) + len(reported))
        self.board.whole = self._progress.text
        chosen: dict[tuple[str, str], float] = {}
        while True:
            wanted = list[Cell]()
            for level, arm in searches:
                state = planned.search(arm.rates, self._losses(level, arm))
                wanted += [Cell(level, arm, rate, seed, CHOOSING) for rate, seed in state.wanted]
                if state.rate is not None:
                    chosen[level.name, arm.name] = state.rate
            if not self._train(wanted):
                break
        self._train(list(planned.reported_cells(self.preset, chosen, perturbed=robust)))
        while not self.exit_code and self._train(list(self.study.explore(self.results()))):
            pass

    def results(self, preset: str = "") -> Results:
        """The table so far."""
        return Results(observations(self.study, preset, self.cells, self.runs.values()), self.study, self.preset)

    def _losses(self, level: Level, arm: Arm) -> dict[float, dict[int, float]]:
        """What a search goes by, of an arm's runs that are over: lower is better, infinite where a run diverged."""
        losses: dict[float, dict[int, float]] = {}
        for name, cell in self.cells.items():
            run = self.runs[name]
            if (cell.level, cell.arm, cell.stage) == (level, arm, CHOOSING) and (run.summary or run.failed):
                losses.setdefault(cell.rate, {})[cell.seed] = guide(self.study, run)
        return losses

    def _train(self, cells: Sequence[Cell]) -> bool:
        """Trains cells that are not done; returns whether there were any, and none was left undone."""
        new = {cell.name: cell for cell in cells if cell.name not in self.cells}
        if self.exit_code or not new:
            return False
        runs = [self._run(cell) for cell in new.values()]
        self.cells |= new
        self.runs |= {
            run.name: RunResult(run.name, run.values, {}, [], None, run.config.out, run.config) for run in runs
        }
        done = {run.name for run in runs if RunDirectory(run.config.out or "").files.present(("summary.json",))}
        runs = [run for run in runs if run.name in done or self.pattern.search(run.name)]
        self._progress.expect(len(self.cells), len(done))
        if runs:
            result = train_runs(runs, self.folder, self.board, at_once=self.at_once, measure=self._measure, go_on=True)
            self.exit_code = result.exit_code
            self._progress.before += len(runs)
            self.runs |= {run.name: run for run in result.runs}
        return any(self.runs[name].summary or self.runs[name].failed for name in new)

    def _run(self, cell: Cell) -> SweepRun:
        data = self._files(cell)
        rate, changes = self.study.learning_rate(cell, data), self.study.settings(cell, self.preset)
        if cell.perturbed:
            model = self.folder.data / "perturbed_model"
            if not (model / "config.json").exists():
                perturb(self.sources.model, model, self.preset.settings.get("model.dtype"))
            changes |= {"model.path": str(model)}
        out = str(self.folder.path / "runs" / cell.name)
        at_rate = dataclasses.replace(cell, rate=rate)
        config = planned.cell_config(at_rate, self.preset, self.sources.model, data, out, changes)
        values = {**cell.level.values, "arm": cell.arm.name, "optimizer.learning_rate": rate, "seed": cell.seed}
        return SweepRun(cell.name, values, config)

    def _files(self, cell: Cell) -> dict[str, Any]:
        """The keys that name the data of a cell, which is written once for all arms."""
        key = cell.level.name, cell.seed
        if key not in self._data:
            keys = self.study.write_data(self.preset, cell.level, cell.seed, self.folder.data, self.sources)
            self._data[key] = keys
        return self._data[key]

    def _measure(self, name: str, tokenizer: Any, model: Any, step: int) -> dict[str, float]:
        cell, steps = self.cells[name], self.runs[name].config.train.steps or 0
        items = None
        if step == steps and cell.stage == REPORTED:
            self.folder.items.mkdir(exist_ok=True)
            items = self.folder.items / f"{name}.jsonl"
            items.unlink(missing_ok=True)
        given = cell, self.preset, self.sources, self.folder.data, self._files(cell)
        return self.study.measure(Evaluation(*given, step, steps, tokenizer, model, self._cache, items))


class _Progress:
    """How far a study is: cells by the share of their steps that is done.

    Attributes:
        before: cells that were over when the runs on the board began.
    """

    def __init__(self, board: Board, expected: int) -> None:
        self._board, self._expected = board, expected
        self.before = self._present = 0
        self._first: tuple[float, float] | None = None

    def expect(self, cells: int, present: int) -> None:
        """So many cells are known, and so many more of them were trained by an earlier process."""
        self._expected = max(self._expected, cells)
        self._present += present

    def text(self) -> str:
        """For a line of the board."""
        states = self._board.runs.values()
        done = self.before + sum(1.0 if one.words == "done" else one.step / max(one.steps, 1) for one in states)
        line = f"  all {self._expected} cells or more: {done / self._expected:.0%}"
        # What an earlier process did is in it, and took no time now.
        trained, now = done - self._present, time.monotonic()
        first, since = self._first = self._first or (trained, now)
        if trained <= first:
            return line
        return line + left_words({"seconds_left": (now - since) / (trained - first) * (self._expected - done)})


def guide(study: Study, run: RunResult) -> float:
    """What a learning rate is chosen by: lower is better, infinite for a run that diverged or failed."""
    name, sign = f"eval_{study.chosen_by}", -1 if study.higher else 1
    losses = [math.inf if row[name] is None else sign * row[name] for row in run.metrics if name in row]
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    if run.failed or not losses or losses[-1] == math.inf:
        return math.inf
    return min(losses) if study.chosen_at_best else losses[-1]


def perturb(model: str, out: Path, dtype: str | None) -> None:
    """Writes a model whose weights have noise of one bfloat16 step: w (1 + u / 256), u uniform in [-1/2, 1/2]."""
    base, tokenizer = load_pretrained(model, dtype="float32" if is_embedded(model) else dtype)
    draw = np.random.default_rng(0)
    state = nnx.state(base, nnx.Param)
    noisy = jax.tree.map(lambda w: w * (1 + (draw.random(w.shape, np.float32) - 0.5) / 256).astype(w.dtype), state)
    nnx.update(base, noisy)
    save_pretrained(base, out, tokenizer=tokenizer)
