"""The training loop: batches in, metrics and checkpoints out, a result at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax

from mora_jax.backend import backend, compiling_for
from mora_jax.batch import Batch
from mora_jax.data.pipeline import BatchIterator
from mora_jax.errors import InputError
from mora_jax.models.attention.causal import Rows
from mora_jax.models.decoder import Decoder
from mora_jax.training.build_step import Assembly, assemble
from mora_jax.training.config.load import changed, check_found, check_same_run
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.display import Display
from mora_jax.training.distributed.processes import Agreement, check_same, check_shared, is_main, several
from mora_jax.training.distributed.signals import FINISHING, StopSignals
from mora_jax.training.evaluator import Evaluator, Measure
from mora_jax.training.hooks import Callback, Callbacks, CompilingHook, Hook, Point, RestartHook, Run, Runner, Watchdog
from mora_jax.training.observe.observer import Observer
from mora_jax.training.observe.profile import Profiler, check_profile
from mora_jax.training.observe.writers import MetricsHook, check_writers
from mora_jax.training.relora import Restarter
from mora_jax.training.run.compilation_cache import persistent_compilation_cache
from mora_jax.training.run.directory import RunDirectory, with_absolute_paths
from mora_jax.training.run.reference import ReferenceHook
from mora_jax.training.run.saving import CheckpointHook, result_name, save_result
from mora_jax.training.setup import NOTHING_IN_MEMORY, InMemory, Setup, prepare
from mora_jax.training.step import StepMetrics


def train(config: Config, display: Display | None = None, *, overwrite: bool = False) -> int:
    """Trains from the start, as `config` says.

    Args:
        config: the whole run.
        display: what the user sees; plain lines on stderr by default.
        overwrite: replace a run that is in `config.out`.

    Returns:
        The process's exit code: 0, or 130 or 143 after a signal (the state is saved then).

    Raises:
        InputError: anything the user has to mend; nothing was written then.
    """
    shown = display or Display()
    directory = RunDirectory(config.out or "", writes=is_main(), note=shown.note)
    with new_run(config, directory, shown, overwrite=overwrite) as trainer:
        return trainer.train()


@contextlib.contextmanager
def new_run(
    config: Config,
    directory: RunDirectory,
    display: Display,
    *,
    objects: InMemory = NOTHING_IN_MEMORY,
    callbacks: Sequence[Callback] = (),
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[Trainer]:
    """A run, ready for its first step: everything is loaded and checked, and its directory made.

    Other runs are kept out of the directory while the context lasts.

    Args:
        config: the whole run.
        directory: where it is recorded.
        display: what the user sees.
        objects: what is in memory already, in place of what `config` names.
        callbacks: see `Trainer`.
        overwrite: replace a run that is in `directory`.
        resume: go on with a run that is there, from its newest checkpoint.

    Raises:
        InputError: anything the user has to mend; nothing was written then.
    """
    resume = resume and directory.files.present(("config.json",)) != []
    if resume:
        check_same_run(directory.path, directory.read_config(), with_absolute_paths(config))
        if directory.files.present(("summary.json",)):
            raise InputError(f"{directory.path} is finished; give overwrite=True to begin anew, or another out=")
    else:
        directory.check_free(overwrite)
    with _prepared(config, objects) as setup:
        if directory.kept:
            check_shared(directory.path)
        with directory.claimed():
            if not resume:
                directory.create(config, overwrite)
            yield Trainer(setup, directory, display, callbacks)


@contextlib.contextmanager
def _prepared(config: Config, objects: InMemory = NOTHING_IN_MEMORY) -> Iterator[Setup]:
    """What a run needs, loaded and checked; what it compiles is kept on disk while the context lasts."""
    check_writers(config)
    with persistent_compilation_cache(config.log.compilation_cache):
        setup = prepare(config, objects)
        check_profile(config, setup.plan.steps)
        check_same(setup.identity())
        yield setup


def resume(
    out: str,
    display: Display | None = None,
    *,
    changes: Sequence[tuple[str, str]] = (),
    profile: Mapping[str, int] | None = None,
) -> int:
    """Continues a run from its newest checkpoint (from the start if it has none); returns as `train`.

    Args:
        out: the run's directory.
        display: as for `train`.
        changes: (dotted key, text) pairs that hold from now on, such as another mesh; see `changed`. They are
            written into the run's `config.json`.
        profile: keys `log.profile_*` for this process alone, in place of the run's own.

    Raises:
        InputError: there is no run, what it was trained on can't be read any more, or something can't be changed.
    """
    shown = display or Display()
    directory = RunDirectory(out, writes=is_main(), note=shown.note)
    check_shared(directory.path)
    config = directory.read_config()
    saved = config = changed(config, changes) if changes else config
    if directory.files.present(("summary.json",)):
        shown.note(f"{directory.path} is finished; nothing to resume")
        return 0
    check_found(config, directory.path)
    if profile:
        config = lay_over(config, [(name, value, "--profile") for name, value in profile.items()])
    with _prepared(config) as setup, directory.claimed():
        rewriting = _ConfigWriter(directory, dataclasses.replace(saved, out=str(directory.path)))
        return Trainer(setup, directory, shown, hooks=[rewriting] if changes else []).train()


class _ConfigWriter(Hook):
    """Writes a changed `config.json` once the run has taken it: a checkpoint may refuse it."""

    def __init__(self, directory: RunDirectory, config: Config) -> None:
        self._directory, self._config = directory, config

    def on_start(self, point: Point) -> Point:
        self._directory.write_config(self._config)
        return point


class Trainer:
    """One run in this process.

    Args:
        setup: what to train on what.
        directory: where it is recorded.
        display: what the user sees.
        callbacks: called with every row of metrics; one that returns True ends it after the step that runs meanwhile.
        hooks: called before the run's own.
        signals: ask it to stop; None: those that this process gets while `run` lasts.
        runner_for: gives what holds the arrays in place of the runner that was put together, as for a run among several
            (mora_jax/sweeps).
        measure: see `Evaluator`.

    Attributes:
        run: what stays as it is from start to end.
        point: how far it is.
        hooks: what takes part in it, in the order in which they are called.
        observer: the hook that measures its steps.
        summary: what `summary.json` holds, once the run is done.
    """

    def __init__(
        self,
        setup: Setup,
        directory: RunDirectory,
        display: Display,
        callbacks: Sequence[Callback] = (),
        *,
        hooks: Sequence[Hook] = (),
        signals: StopSignals | None = None,
        runner_for: Callable[[Assembly], Runner] | None = None,
        measure: Measure | None = None,
    ):
        config, steps = setup.config, setup.plan.steps
        assembly = assemble(setup.model, config, steps, setup.mesh, setup.optimizer)
        runner = assembly.runner if runner_for is None else runner_for(assembly)
        if signals is None:
            signals = StopSignals(Agreement() if several() else None, display.note)
        self.run = run = Run(setup, directory, display, assembly, runner, signals)
        self.point = Point(0, assembly.placed_state(config.seed), runner.place(assembly.frozen))
        self.observer = Observer(run)
        self._evaluator = Evaluator(run, measure)
        self._checkpoints: CheckpointHook | None = None
        restarter = None
        if assembly.restarts is not None:
            state, frozen = runner.unreplicate((self.point.state, self.point.frozen))
            restarter = Restarter(assembly.structure, assembly.restarts, state, frozen)
        watchdog = Watchdog(config.train.watchdog_seconds, self._report_hang)
        hooks = [*hooks, ReferenceHook(run, self.point)] if config.loss.reference == "cached" else hooks
        self.hooks = [*hooks, watchdog, CompilingHook(run), self.observer, Profiler(run), MetricsHook(run)]
        self.hooks += [] if restarter is None else [RestartHook(run, restarter)]
        self.hooks.append(self._evaluator)
        if directory.kept:
            self._checkpoints = CheckpointHook(run, restarter)
            self.hooks.append(self._checkpoints)
        self.hooks.append(Callbacks(callbacks))
        self._lengths: Iterator[Batch] = iter(())  # a batch of each length
        self._enough = False  # whether a hook has said so
        self._pending: tuple[int, StepMetrics] | None = None  # the last step, while its metrics are not read
        self.summary = dict[str, Any]()

    def train(self) -> int:
        """Trains to the end, or to the step boundary after a signal; returns the exit code."""
        with self.run.signals, contextlib.closing(self.work()) as work:
            result: Any = None
            while True:
                try:
                    batch = work.send(result)
                except StopIteration as end:
                    return end.value
                result = self.stepped(batch)

    def stepped(self, batch: Batch) -> tuple[Any, StepMetrics]:
        """A step of its own: the state after it, and its metrics. Beside it the next length's is compiled."""
        runner = self.run.assembly.runner
        state, metrics = runner(self.point.state, self.point.frozen, batch, self.compiling)
        runner.compile_ahead(state, self.point.frozen, self._lengths)
        return state, metrics

    def work(self) -> Generator[Batch, tuple[Any, StepMetrics], int]:
        """The run, but for the steps themselves: yields each batch, and is sent the state after it and its metrics.

        Returns:
            The exit code.
        """
        started, run = time.perf_counter(), self.run
        steps = run.setup.plan.steps
        with run.display, contextlib.ExitStack() as context:
            batches = self._start(context)
            first = self.point.step
            if run.signals.received:
                return self._stopped()
            for step in range(first + 1, steps + 1):
                if step == steps and not self._evaluator.due(steps, last=True):
                    run.signals.announce(FINISHING)
                for hook in self.hooks:
                    hook.on_begin(step)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    asked = time.perf_counter()
                    batch = next(batches)
                    self.observer.clock.waited_for_data(asked)
                    if self._pending is not None and _is_done(self._pending[1]):
                        self._report()
                    state, metrics = yield batch
                    self.point = Point(step, state, self.point.frozen)  # the state before is no more
                    self.observer.sent(step)
                    # Metrics are read a step late, so the device always has the next step in its queue.
                    self._report()
                self._pending = step, metrics
                last = step == steps or self._enough
                self.point = self.point._replace(last=last)
                run.signals.look()
                if last or run.signals.received or any(hook.due(step, last) for hook in self.hooks):
                    self._report(last)
                    self._each(lambda hook, point: hook.on_pause(point))
                    if run.signals.received and not self.point.over:
                        return self._stopped()
                if last:
                    break
            run.signals.announce(FINISHING)
            self._finish(started, first)
            return run.signals.exit_code if run.signals.look() else 0

    def _start(self, context: contextlib.ExitStack) -> BatchIterator:
        """Goes to the newest checkpoint, and opens all that is open while the run lasts; returns the batches."""
        run, setup = self.run, self.run.setup
        context.callback(run.directory.files.close)
        for hook in self.hooks:
            context.enter_context(hook)
        if self._checkpoints is not None:
            self.point = self._checkpoints.restored(self.point)
        first = self.point.step
        share = run.runner.share(setup.micro_batch)
        source = dataclasses.replace(setup.batches, rows=share.rows)
        batches = context.enter_context(contextlib.closing(BatchIterator(source, first, place=share.place)))
        lengths = setup.plan.lengths(source.length)
        if len(lengths) > 1 and not several():  # processes compile in one order
            context.callback(run.assembly.runner.close, run.display.waiting)
            self._lengths = (share.place(source[step]) for step in lengths.values())
        for row in run.directory.rewind_metrics(first):
            for hook in self.hooks:
                hook.remember(row)
        run.display.start(setup.info(first, str(run.directory.path), self._attention()))
        placement = run.assembly.placement
        for note in placement.notes() if placement is not None else ():
            run.display.note(note)
        self._each(lambda hook, point: hook.on_start(point))
        if self.point.evaluation is not None:
            run.display.loading("compiling")
        return batches

    def _each(self, event: Callable[[Hook, Point], Point]) -> None:
        """What comes between two steps, hook by hook; all of them hear of an evaluation."""
        for hook in self.hooks:
            before, self.point = self.point, event(hook, self.point)
            row = self.point.evaluation
            if row is not None and row is not before.evaluation:
                self.run.display.evaluation(row)
                for other in self.hooks:
                    self._enough |= bool(other.on_evaluation(row))
        self.observer.clock.restart()

    def _report(self, last: bool = False) -> None:
        """Waits for the metrics of the step that is not read yet, if any, records and shows them."""
        pending, self._pending = self._pending, None
        row = None if pending is None else self.observer.row(*pending, last)
        if row is None:
            return
        left = (self.run.setup.plan.steps - row["step"]) * self.observer.clock.mean_step
        left += sum(hook.seconds_left(row["step"]) for hook in self.hooks)
        self.run.display.step(row | {"seconds_left": left})
        for hook in self.hooks:
            self._enough |= bool(hook.on_step(row))

    @contextlib.contextmanager
    def compiling(self, length: int) -> Iterator[None]:
        """Around a compilation of the step for rows of so many tokens."""
        # The time of the step before would end anywhere in the compilation, which is left out of it.
        self._report()
        with contextlib.ExitStack() as context:
            for hook in self.hooks:
                context.enter_context(hook.compiling(length))
            yield

    def model(self) -> Any:
        """The model as trained so far."""
        return self.run.model(self.point)

    def _attention(self) -> str:
        """What computes attention, in words; of rows as long as they get."""
        setup, model, partitioner = self.run.setup, self.run.setup.model, self.run.assembly.settings.partitioner
        if not isinstance(model, Decoder):
            return "the model"
        sizes = setup.micro_batch, setup.batches.length
        rows = Rows(model.config, model.dtype, *sizes, partitioner, setup.config.data.packing)
        # Under pmap each device computes its rows alone.
        with compiling_for(backend()) if setup.config.mesh.pmap else contextlib.nullcontext():
            return "xla" if model.attention is None else model.attention.implementation(rows)

    def _report_hang(self, text: str) -> None:
        self.run.display.note(text)
        self.run.directory.append_hang(text)

    def _stopped(self) -> int:
        """Says how the run goes on; returns the exit code."""
        directory, owed = self.run.directory, f", before {self.point.owed}" if self.point.owed else ""
        how = f"; continue with --resume {directory.path}" if directory.kept else ""
        self.run.display.note(f"stopped after step {self.point.step}{owed}{how}")
        return self.run.signals.exit_code

    def _finish(self, started: float, first: int) -> None:
        """Writes the result and the summary."""
        run, setup = self.run, self.run.setup
        run.display.loading("saving")
        name = result_name(run.config)
        save_result(run, name, self.model)
        parts = [hook.summary(self.point) for hook in self.hooks]
        opened = {name: command for part in parts for name, command in part.pop("open", {}).items()}
        compilations, last_loss = run.runner.compilation_log, self.observer.last_loss
        self.summary = {
            "method": run.config.adapter.method,
            "method_settings": setup.method,
            "trainable_parameters": setup.attached.trainable,
            "total_parameters": setup.attached.total,
            "steps": self.point.step,
            # What is measured is of the last process: of the steps after this one.
            "resumed_after": first or None,
            "compilations": len(compilations),
            "compile_seconds": sum(one.waited for one in compilations),
            "trained_fraction": setup.train.report.trained_fraction,
            "padding": setup.plan.padding(setup.batches.length),
            "final_loss": None if math.isnan(last_loss) else last_loss,
            **{key: value for part in parts for key, value in part.items()},
            "open": opened,
            "wall_seconds": time.perf_counter() - started,
            "result": str(run.directory.path / name) if run.directory.kept else None,
        }
        for hook in self.hooks:
            hook.on_end(self.summary)
        run.directory.files.flush()  # a run with a summary has all its rows
        run.directory.write_json("summary.json", self.summary)
        run.display.finish(self.summary)


def _is_done(metrics: StepMetrics) -> bool:
    """Whether a step has ended: on several CPU devices, and on CPUs with jax before 0.8, its call waits for that."""
    leaves: list[Any] = jax.tree.leaves(metrics)
    return all(getattr(leaf, "is_ready", bool)() for leaf in leaves)
