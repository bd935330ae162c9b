"""Sweeps, from Python and for the command: group after group of runs, those of a group step by step together."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from flax import nnx

from mora_jax.adapters.base import AdapterParam, FullParam
from mora_jax.errors import InputError
from mora_jax.models.decoder import Decoder
from mora_jax.models.own import draws
from mora_jax.sweeps.board import Board, make_board
from mora_jax.sweeps.folder import SweepFolder
from mora_jax.sweeps.grid import SweepRun, combinations, expand
from mora_jax.sweeps.results import RunResult, SweepResult
from mora_jax.sweeps.stack import Stack, base_of, groups_of, stackable
from mora_jax.training.config.schema import Config
from mora_jax.training.distributed.signals import StopSignals
from mora_jax.training.finetune import configured
from mora_jax.training.hooks import Callback
from mora_jax.training.loop import Trainer
from mora_jax.training.observe.writers import check_writers
from mora_jax.training.run.compilation_cache import persistent_compilation_cache
from mora_jax.training.run.directory import RunDirectory
from mora_jax.training.setup import NOTHING_IN_MEMORY, InMemory, Setup, encode_data, load_base, prepare
from mora_jax.training.sharding.mesh import make_mesh

#: Scores a run, given its name, its tokenizer, its model, and the steps done: values by name.
RunMeasure = Callable[[str, Any, Decoder, int], dict[str, float]]


def sweep(
    model: Decoder | str | os.PathLike[str],
    rows: Any,
    adapter_config: Any = None,
    *,
    grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]],
    tokenizer: Any = None,
    loss: str = "masked",
    eval_rows: Any = None,
    steps: int | None = None,
    batch_size: int | None = None,
    out: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], Any]] = (),
    config: Mapping[str, Any] | None = None,
    at_once: int | None = None,
    overwrite: bool = False,
    board: Board | None = None,
) -> SweepResult:
    """Fine-tunes a model with several settings at once; each run has the result of `finetune` with its settings.

    Runs that differ in numbers alone (learning rate and its schedule, weight decay, seed, loss mode) train together:
    one compiled step over one base in memory. Others follow in groups of their own.

    Args:
        model: as for `finetune`; one in memory is not changed.
        rows: dictionaries or paths, as for `finetune`.
        adapter_config: a method's configuration; None where `grid` or `config` says the method.
        grid: the values of each swept key, by its dotted name: `{"optimizer.learning_rate": [1e-4, 1e-3], "seed": [0,
            1]}` means all combinations. Or a list of dictionaries, one a run: `[{"adapter.method": "lora",
            "optimizer.learning_rate": 1e-3}, …]`.
        tokenizer: for that of the model's folder.
        loss: the loss mode, or an objective of preferences, as for `finetune`.
        eval_rows: as for `finetune`.
        steps: optimiser steps.
        batch_size: rows an optimiser step.
        out: the sweep's folder, with a run directory a run below `runs`; None writes nothing. A sweep that was stopped
            goes on if it is called again with the same arguments.
        callbacks: each is called with every row of metrics of every run, which has the run's name under `run`; one that
            returns True ends that run one step later.
        config: any other keys of the configuration by dotted name.
        at_once: the most runs that train together, where memory is short; None for no limit.
        overwrite: replace a sweep that is in `out`.
        board: what is shown; None: a live table on a terminal or in a notebook, plain lines elsewhere.

    Returns:
        What came of each run, and the best.

    Raises:
        InputError: whatever has to be fixed, in one line.

    Examples:
        >>> import mora_jax as mj
        >>> from mora_jax import demo
        >>> rows = [{"prompt": "What is the capital of France?", "completion": "Paris"}] * 8
        >>> rates = {"optimizer.learning_rate": [1e-3, 3e-3]}
        >>> settings = {"data.max_length": 64}
        >>> result = mj.sweep(demo.model_path(), rows, mj.LoRAConfig(rank=4), grid=rates, steps=2, config=settings)
        >>> [run.name for run in result.runs]
        ['learning_rate=0.001', 'learning_rate=0.003']
    """
    settings = combinations(grid) if isinstance(grid, Mapping) else [dict(values) for values in grid]
    if not settings:
        raise InputError("grid is empty: give a dictionary of keys with their values, or one dictionary a run")
    common = dict(config or {})
    both = next((name for values in settings for name in values if name in common), None)
    if both:
        raise InputError(f"{both} is in config and in grid; leave it out of one of them")
    arguments = {"train.steps": steps, "train.batch_size": batch_size}
    objects, config_of = configured(model, rows, adapter_config, tokenizer, eval_rows, out, loss, arguments)
    path = None if out is None else os.fspath(out)
    folder = None if path is None else SweepFolder(path)
    runs = expand(settings, lambda values: config_of(common | values, "grid"), path)
    shown = make_board() if board is None else board
    return train_runs(runs, folder, shown, objects=objects, callbacks=callbacks, at_once=at_once, overwrite=overwrite)


def train_runs(
    runs: Sequence[SweepRun],
    folder: SweepFolder | None,
    board: Board,
    *,
    objects: InMemory = NOTHING_IN_MEMORY,
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
    goes_on = folder is not None and folder.check_free(runs, overwrite)
    with contextlib.ExitStack() as context:
        context.enter_context(persistent_compilation_cache(runs[0].config.log.compilation_cache))
        sweep = _Sweep(runs, folder, board, objects, callbacks, measure, go_on, context)
        if folder is not None and goes_on:
            context.enter_context(folder.claimed())
            sweep.take_up(folder.failed())
        board.begin([run.name for run in runs])
        for name, result in sweep.results.items():
            board.ended(name, result.failed or "done")
        with board:
            code = sweep.train(at_once, None if goes_on else overwrite)
        results = [sweep.results.get(run.name) or sweep.result(run, sweep.directory(run)) for run in runs]
        outcome = SweepResult(results, None if folder is None else str(folder.path), code)
        if folder is not None and code == 0 and (why := folder.write(outcome)):
            board.note(f"no plot: {why}")
    return outcome


@dataclass
class _Sweep:
    """A sweep under way.

    Attributes:
        context: what it holds until its end.
        results: of the runs that are over, by name.
    """

    runs: Sequence[SweepRun]
    folder: SweepFolder | None
    board: Board
    objects: InMemory
    callbacks: Sequence[Callback]
    measure: RunMeasure | None
    go_on: bool
    context: contextlib.ExitStack
    results: dict[str, RunResult] = field(default_factory=dict)

    def take_up(self, failed: Mapping[str, str]) -> None:
        """Reads the results of runs that are over; `failed` has what was said of those that failed, by name."""
        for run in self.runs:
            result = self.result(run, self.directory(run), failed.get(run.name))
            if result.summary or result.failed:
                self.results[run.name] = result

    def directory(self, run: SweepRun) -> RunDirectory:
        """The run's folder, or a record in memory."""
        note = self.board.of(run.name).note
        return RunDirectory(None if self.folder is None else run.config.out or "", note=note)

    def result(
        self, run: SweepRun, directory: RunDirectory, failed: str | None = None, model: Decoder | None = None
    ) -> RunResult:
        """What came of a run, as its directory has it."""
        summary, metrics = directory.read_json("summary.json") or {}, directory.read_metrics()
        out = run.config.out if directory.kept else None
        return RunResult(run.name, run.values, summary, metrics, failed, out, run.config, model)

    def train(self, at_once: int | None, overwrite: bool | None) -> int:
        """Trains the runs that are not over; returns 0, or the exit code after a signal.

        Args:
            at_once: the most runs that train together.
            overwrite: as of the sweep, whose folder is made before the first run begins; None where that was done.
        """
        left = [run for run in self.runs if run.name not in self.results]
        groups = groups_of(left, at_once, masked=draws(self.objects.model))
        for _, on_base in itertools.groupby(groups, key=lambda group: base_of(group[0])):
            for setups in self._prepared(list(on_base)):
                if self.folder is not None and overwrite is not None:  # everything was found good
                    self.context.enter_context(self.folder.claimed())
                    self.folder.create(self.runs, overwrite)
                    overwrite = None
                if code := self._train_group(setups):
                    return code
        return 0

    def _prepared(self, groups: Sequence[Sequence[SweepRun]]) -> Iterator[list[tuple[SweepRun, Setup]]]:
        """The groups on one base, ready to start; all of them are, before the first one is given out."""
        config, objects = groups[0][0].config, self.objects
        self.board.loading(f"loading {config.model.path}")
        if objects.model is not None and not stackable(config):
            graphdef, state = nnx.split(objects.model)
            copied = nnx.merge(graphdef, jax.tree.map(lambda array: array.copy(), state))  # the run changes it
            objects = replace(objects, model=copied)
        model, tokenizer, _ = load_base(config, objects)
        encoded: dict[Any, Any] = {}

        def encode(config: Config, *arguments: Any) -> Any:
            """As `encode_data`, once for all runs on the same data."""
            held_out = config.data.eval is None and config.data.eval_fraction > 0
            key = config.data, config.loss, config.seed if held_out else 0
            if key not in encoded:
                encoded[key] = encode_data(config, *arguments)
            return encoded[key]

        setups: dict[str, Setup] = {}
        for run in itertools.chain(*groups):
            shared = nnx.merge(*nnx.split(model))  # its arrays
            try:
                setups[run.name] = prepare(run.config, replace(objects, model=shared, tokenizer=tokenizer), encode)
            except InputError as error:
                if not self.go_on:
                    raise InputError(f"run {run.name}: {error}") from None
                self._ended(run, self.directory(run), str(error))
        for group in groups:
            # What is known of the data alone: as many steps, and masks of dropout for the same places.
            shapes: dict[Any, list[tuple[SweepRun, Setup]]] = {}
            for run in group:
                if setup := setups.pop(run.name, None):
                    length = setup.batches.length if run.config.adapter.dropout or draws(setup.model) else 0
                    shapes.setdefault((setup.plan.steps, length), []).append((run, setup))
            yield from shapes.values()

    def _train_group(self, setups: Sequence[tuple[SweepRun, Setup]]) -> int:
        """Trains runs together to their ends; returns 0, or the exit code after a signal."""
        runs = [run for run, _ in setups]
        self.board.group([run.name for run in runs])
        signals = StopSignals(None, self.board.note)
        stack = Stack(make_mesh(1)) if stackable(runs[0].config) else None
        with contextlib.ExitStack() as context:
            trainers = []
            for run, setup in setups:
                directory = context.enter_context(self._opened(run))
                trainers.append(self._trainer(run, setup, directory, signals, stack))
            context.enter_context(signals)
            self._steps(runs, trainers, stack)
            self.board.round()
        return 0 if signals.received is None else signals.exit_code

    @contextlib.contextmanager
    def _opened(self, run: SweepRun) -> Iterator[RunDirectory]:
        """The run's folder, new or with what it did before it was stopped."""
        directory = self.directory(run)
        with directory.claimed():
            if not directory.files.present(("config.json",)):
                directory.create(run.config, False)
            yield directory

    def _trainer(
        self, run: SweepRun, setup: Setup, directory: RunDirectory, signals: StopSignals, stack: Stack | None
    ) -> Trainer:
        def named(callback: Callback) -> Callback:
            return lambda row: callback({"run": run.name, **row})

        join = measure = None
        if stack is not None:
            join = functools.partial(stack.join, optimizer=run.config.optimizer, steps=setup.plan.steps)
        if self.measure is not None:
            measure = functools.partial(self.measure, run.name, setup.tokenizer)
        callbacks = [named(callback) for callback in self.callbacks]
        display = self.board.of(run.name)
        return Trainer(setup, directory, display, callbacks, signals=signals, runner_for=join, measure=measure)

    def _steps(self, runs: Sequence[SweepRun], trainers: Sequence[Trainer], stack: Stack | None) -> None:
        """Steps the runs until the last of them is over."""
        results: dict[int, Any] = {}
        with contextlib.ExitStack() as context:
            works = {i: context.enter_context(contextlib.closing(t.work())) for i, t in enumerate(trainers)}
            while works:
                batches = {}
                for index, work in list(works.items()):
                    trainer, failed = trainers[index], None
                    try:
                        batches[index] = work.send(results.get(index))  # type: ignore[arg-type]  # None starts it
                        continue
                    except StopIteration:
                        pass
                    except InputError as error:
                        failed = str(error)
                    del works[index]
                    model = trainer.model() if self.folder is None and failed is None else None
                    self._ended(runs[index], trainer.run.directory, failed, model)
                self.board.round()
                for index in batches:  # the others' evaluations and checkpoints are no part of a run's step
                    trainers[index].observer.clock.first_sent()
                if stack is None:
                    results = {index: trainers[index].stepped(batch) for index, batch in batches.items()}
                elif batches:
                    states = [trainer.point.state for trainer in trainers]
                    results = stack.step(states, batches, functools.partial(_compiling, trainers))

    def _ended(
        self, run: SweepRun, directory: RunDirectory, failed: str | None = None, model: Decoder | None = None
    ) -> None:
        """A run is over, or has ended by an error of its own, and the others go on."""
        self.results[run.name] = self.result(run, directory, failed, model)
        if failed is not None:
            self.board.said(run.name, f"failed: {failed}")
            self.board.ended(run.name, failed)
            if self.folder is not None:
                self.folder.note_failure(run.name, failed)


@contextlib.contextmanager
def _compiling(trainers: Sequence[Trainer], length: int) -> Iterator[None]:
    with contextlib.ExitStack() as context:
        for trainer in trainers:
            context.enter_context(trainer.compiling(length))
        yield
