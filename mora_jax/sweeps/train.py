"""Trains the runs of a sweep: group after group, the runs of a group step by step together."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from mora_jax.adapters.base import AdapterParam, FullParam
from mora_jax.errors import InputError
from mora_jax.models.decoder import Decoder
from mora_jax.sweeps.board import Board
from mora_jax.sweeps.folder import SweepFolder
from mora_jax.sweeps.grid import SweepRun
from mora_jax.sweeps.groups import groups_of, stackable
from mora_jax.sweeps.results import SweepResult
from mora_jax.sweeps.run_result import RunResult
from mora_jax.sweeps.stack import Stack
from mora_jax.training.config.schema import Config, ModelConfig
from mora_jax.training.distributed.signals import StopSignals
from mora_jax.training.loop import Callback, Trainer
from mora_jax.training.observe.writers import check_writers
from mora_jax.training.run.compilation_cache import persistent_compilation_cache
from mora_jax.training.run.directory import MemoryDirectory, RunDirectory
from mora_jax.training.setup import NOTHING, Objects, Setup, encode_data, load_base, prepare
from mora_jax.training.sharding.mesh import make_mesh

#: Scores a run, given its name, its tokenizer, its model, and the steps done: values by name.
RunMeasure = Callable[[str, Any, Decoder, int], dict[str, float]]


def train_runs(
    runs: Sequence[SweepRun],
    folder: SweepFolder | None,
    board: Board,
    *,
    objects: Objects = NOTHING,
    callbacks: Sequence[Callback] = (),
    at_once: int | None = None,
    overwrite: bool = False,
    measure: RunMeasure | None = None,
    go_on: bool = False,
) -> SweepResult:
    """Trains what is not done yet.

    Args:
        runs: of the sweep, with names and folders of their own.
        folder: of the sweep; None where nothing is written.
        board: what the user sees.
        objects: what is in memory already, in place of what the configurations name.
        callbacks: called with every row of metrics of every run, which has the run's name under `run`.
        at_once: the most runs that train together; None for no limit.
        overwrite: replace a sweep that is in the folder.
        measure: what else is scored in every evaluation of a run, see `RunMeasure`.
        go_on: whether a run that can't begin has failed, and the others go on; else nothing begins then.

    Raises:
        InputError: anything the user has to mend. Before the first run has begun nothing was written then.
    """
    if objects.model is not None and jax.tree.leaves(nnx.state(objects.model, (AdapterParam, FullParam))):
        raise InputError("the model carries adapters already; a sweep starts from a model without: detach them first")
    check_writers(runs[0].config)
    goes_on = False if folder is None else folder.check_free(runs, overwrite)
    sweep = _Sweep(folder, board, objects, callbacks, measure, go_on)
    with contextlib.ExitStack() as stack:
        stack.enter_context(persistent_compilation_cache(runs[0].config.log.compilation_cache))
        if folder is not None:
            if goes_on:
                stack.enter_context(folder.claimed())
                sweep.take_up(runs)
            else:
                sweep.begin = functools.partial(_create, stack, folder, runs, overwrite)
        board.begin([run.name for run in runs])
        for name, ended in sweep.results.items():
            board.ended(name, ended.failed or "done")
        with board:
            code = sweep.train([run for run in runs if run.name not in sweep.results], at_once)
        for run in runs:
            sweep.results.setdefault(run.name, sweep.result(run))
        out = None if folder is None else str(folder.path)
        result = SweepResult([sweep.results[run.name] for run in runs], out, code)
        if folder is not None and code == 0 and (why := folder.write(result)):
            board.note(f"no plot: {why}")
    return result


def _create(context: contextlib.ExitStack, folder: SweepFolder, runs: Sequence[SweepRun], overwrite: bool) -> None:
    """Makes the folder of a new sweep, and keeps others out of it while the context lasts."""
    context.enter_context(folder.claimed())
    folder.create(runs, overwrite)


@dataclass
class _Base:
    """A base in memory with what the runs on it have in common."""

    model: Decoder
    tokenizer: Any
    objects: Objects
    encoded: dict[Any, Any] = field(default_factory=dict)

    def setup(self, config: Config) -> Setup:
        """A run on the base, whose arrays it shares."""
        model = nnx.merge(*nnx.split(self.model))
        rows, eval_rows = self.objects.rows, self.objects.eval_rows
        return prepare(config, Objects(model, self.tokenizer, rows, eval_rows), self._encode)

    def _encode(self, config: Config, *arguments: Any) -> Any:
        """As `encode_data`, once for all runs on the same data."""
        held_out = config.data.eval is None and config.data.eval_fraction > 0
        key = config.data, config.loss, config.seed if held_out else 0
        if key not in self.encoded:
            self.encoded[key] = encode_data(config, *arguments)
        return self.encoded[key]


class _Sweep:
    """A sweep under way.

    Attributes:
        results: of the runs that are over, by name.
        begin: called once, before the first run begins: everything was found good.
    """

    def __init__(
        self,
        folder: SweepFolder | None,
        board: Board,
        objects: Objects,
        callbacks: Sequence[Callback],
        measure: RunMeasure | None,
        go_on: bool,
    ) -> None:
        self._folder, self._board, self._objects, self._callbacks = folder, board, objects, callbacks
        self._measure, self._go_on = measure, go_on
        self.results: dict[str, RunResult] = {}
        self.begin: Callable[[], Any] | None = None

    def take_up(self, runs: Sequence[SweepRun]) -> None:
        """Reads the results of runs that are over."""
        assert self._folder is not None, "there is something to take up"
        failed = self._folder.failed()
        for run in runs:
            directory = RunDirectory(run.config.out or "")
            summary = directory.files.read("summary.json")
            if summary is not None or run.name in failed:
                self.results[run.name] = self.result(run, directory, json.loads(summary or "{}"), failed.get(run.name))

    def result(
        self,
        run: SweepRun,
        directory: RunDirectory | None = None,
        summary: dict[str, Any] | None = None,
        failed: str | None = None,
        model: Decoder | None = None,
    ) -> RunResult:
        """What came of a run; without a directory of one that this process did not begin."""
        out = run.config.out if self._folder is not None else None
        if directory is None and out is not None:
            directory = RunDirectory(out)
        metrics = [] if directory is None else directory.read_metrics()
        return RunResult(run.name, run.values, summary or {}, metrics, failed, out, run.config, model)

    def train(self, runs: Sequence[SweepRun], at_once: int | None) -> int:
        """Trains these runs; returns 0, or the exit code after a signal."""
        together = [run for run in runs if stackable(run.config)]
        for model, members in itertools.groupby(groups_of(together, at_once), key=lambda group: group[0].config.model):
            if code := self._train_base(model, list(members)):
                return code
        alone = (self._train_alone(run) for run in runs if not stackable(run.config))
        return next((code for code in alone if code), 0)

    def _train_base(self, model: ModelConfig, groups: Sequence[Sequence[SweepRun]]) -> int:
        """The groups on one base."""
        self._board.loading(f"loading {model.path}")
        loaded, tokenizer, _ = load_base(groups[0][0].config, self._objects)
        base = _Base(loaded, tokenizer, self._objects)
        setups = {run.name: self._prepared(run, base.setup) for group in groups for run in group}
        for group in groups:
            # What is known of the data alone: as many steps, and masks of dropout for the same places.
            shapes: dict[Any, list[SweepRun]] = {}
            for run in group:
                setup = setups[run.name]
                if setup is None:
                    continue
                length = setup.batches.length if run.config.adapter.dropout else 0
                shapes.setdefault((setup.plan.steps, length), []).append(run)
            for part in shapes.values():
                if code := self._train_group(part, {run.name: setups.pop(run.name) for run in part}):  # type: ignore[misc]
                    return code
        return 0

    def _train_alone(self, run: SweepRun) -> int:
        """A run that shares nothing: its base changes."""
        self._board.loading(f"loading {run.config.model.path}")
        objects = self._objects
        if objects.model is not None:
            graphdef, state = nnx.split(objects.model)
            copied = nnx.merge(graphdef, jax.tree.map(lambda array: array.copy(), state))
            objects = Objects(copied, objects.tokenizer, objects.rows, objects.eval_rows)
        setup = self._prepared(run, lambda config: prepare(config, objects))
        return 0 if setup is None else self._train_group([run], {run.name: setup}, alone=True)

    def _prepared(self, run: SweepRun, make: Callable[[Config], Setup]) -> Setup | None:
        """The run, ready to start; None where it can't and the others go on."""
        try:
            return make(run.config)
        except InputError as error:
            if not self._go_on:
                raise InputError(f"run {run.name}: {error}") from None
            self._failed(run, str(error), None)
            return None

    def _train_group(self, runs: Sequence[SweepRun], setups: Mapping[str, Setup], *, alone: bool = False) -> int:
        """Trains runs together to their ends; returns 0, or the exit code after a signal."""
        if self.begin is not None:
            self.begin()
            self.begin = None
        self._board.group([run.name for run in runs])
        stack = None if alone else Stack(make_mesh(1))
        with contextlib.ExitStack() as context:
            trainers = []
            for run in runs:
                directory = context.enter_context(_directory(run, kept=self._folder is not None))
                trainers.append(self._trainer(run, setups[run.name], directory, stack))
            signals = context.enter_context(StopSignals(None, self._board.note))
            self._steps(runs, trainers, stack, signals)
            self._board.round()
            for run, trainer in zip(runs, trainers, strict=True):
                if run.name not in self.results:
                    model = trainer.trained_model() if self._folder is None else None
                    self.results[run.name] = self.result(run, trainer.directory, dict(trainer.summary), None, model)
            return 0 if signals.received is None else signals.exit_code

    def _trainer(self, run: SweepRun, setup: Setup, directory: RunDirectory, stack: Stack | None) -> Trainer:
        def call(callback: Callback) -> Callback:
            return lambda row: callback({"run": run.name, **row})

        callbacks = [call(callback) for callback in self._callbacks]
        join = None
        if stack is not None:
            optimizer, steps = run.config.optimizer, setup.plan.steps
            join = lambda made: stack.join(made, optimizer, steps)  # noqa: E731
        measure = None
        if self._measure is not None:
            measure = functools.partial(self._measure, run.name, setup.tokenizer)
        return Trainer(setup, directory, self._board.of(run.name), callbacks, join, measure)

    def _steps(
        self, runs: Sequence[SweepRun], trainers: Sequence[Trainer], stack: Stack | None, signals: StopSignals
    ) -> None:
        """Steps the runs until the last of them is over."""
        replies: dict[int, Any] = {}
        with contextlib.ExitStack() as context:
            works = {i: context.enter_context(contextlib.closing(t.work(signals))) for i, t in enumerate(trainers)}
            while works:
                batches = {}
                for index, work in list(works.items()):
                    try:
                        batches[index] = work.send(replies.get(index))  # type: ignore[arg-type]  # None starts it
                    except StopIteration:
                        del works[index]
                        # The others step on, and the stack with them.
                        trainers[index].state = trainers[index].runner.whole(trainers[index].state)
                    except InputError as error:
                        del works[index]
                        self._failed(runs[index], str(error), trainers[index].directory)
                self._board.round()
                if not works:
                    break
                for index in works:  # the others' evaluations and checkpoints are no part of a run's step
                    trainers[index].observer.clock.first_sent()
                if stack is None:
                    trainer = trainers[0]
                    replies = {0: trainer.runner(trainer.state, trainer.frozen, batches[0])}
                else:
                    replies = stack.step({index: trainer.state for index, trainer in enumerate(trainers)}, batches)

    def _failed(self, run: SweepRun, words: str, directory: RunDirectory | None) -> None:
        """A run ended by an error of its own; the others go on."""
        self._board.said(run.name, f"failed: {words}")
        self._board.ended(run.name, words)
        self.results[run.name] = self.result(run, directory, failed=words)
        if self._folder is not None:
            self._folder.note_failure(run.name, words)


@contextlib.contextmanager
def _directory(run: SweepRun, *, kept: bool) -> Iterator[RunDirectory]:
    """The run's folder, new or with what it did before it was stopped."""
    directory = RunDirectory(run.config.out or "") if kept else MemoryDirectory()
    with directory.claimed():
        if not directory.files.present(("config.json",)):
            directory.create(run.config, False)
        yield directory
