"""The training loop: batches in, metrics and checkpoints out, a result at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax.adapters.products.quantization import packed_sizes
from mora_jax.backend import backend, compiling_for
from mora_jax.batch import Batch
from mora_jax.data.pipeline import BatchIterator
from mora_jax.models.attention.causal import Rows
from mora_jax.models.decoder import Decoder
from mora_jax.training.build_step import Assembly, assemble
from mora_jax.training.config.load import changed, check_found
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.display.plain import Display
from mora_jax.training.distributed.processes import Agreement, check_same, check_shared, is_main, several
from mora_jax.training.distributed.signals import StopSignals
from mora_jax.training.distributed.watchdog import Watchdog
from mora_jax.training.evaluator import Evaluator, Measure
from mora_jax.training.observe.flops import StepFlops
from mora_jax.training.observe.observer import Observer
from mora_jax.training.observe.profile import check_profile
from mora_jax.training.observe.step_rows import StepRows
from mora_jax.training.observe.writers import check_writers
from mora_jax.training.relora import Restarter
from mora_jax.training.run.checkpoint import Checkpoints, NoCheckpoints
from mora_jax.training.run.compilation_cache import persistent_compilation_cache
from mora_jax.training.run.directory import RunDirectory
from mora_jax.training.run.export import result_name, write_result, write_with_retries
from mora_jax.training.run.identity import run_identity
from mora_jax.training.setup import NOTHING, Objects, Setup, prepare
from mora_jax.training.state import Arrays, TrainState
from mora_jax.training.step import StepMetrics

Callback = Callable[[dict[str, Any]], Any]


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
    directory = RunDirectory(config.out or "", writes=is_main())
    with new_run(config, directory, display or Display(), overwrite=overwrite) as trainer:
        return trainer.run()


@contextlib.contextmanager
def new_run(
    config: Config,
    directory: RunDirectory,
    display: Display,
    *,
    objects: Objects = NOTHING,
    callbacks: Sequence[Callback] = (),
    overwrite: bool = False,
) -> Iterator[Trainer]:
    """A new run, ready for its first step: everything is loaded and checked, and its directory made.

    Other runs are kept out of the directory while the context lasts.

    Args:
        config: the whole run.
        directory: where it is recorded.
        display: what the user sees.
        objects: what is in memory already, in place of what `config` names.
        callbacks: see `Trainer`.
        overwrite: replace a run that is in `directory`.

    Raises:
        InputError: anything the user has to mend; nothing was written then.
    """
    directory.check_free(overwrite)
    check_writers(config)
    with persistent_compilation_cache(config.log.compilation_cache):
        setup = prepare(config, objects)
        check_profile(config, setup.plan.steps)
        check_same(setup.identity())
        if directory.kept:
            check_shared(directory.path)
        with directory.claimed():
            directory.create(config, overwrite)
            yield Trainer(setup, directory, display, callbacks)


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
    directory = RunDirectory(out, writes=is_main())
    check_shared(directory.path)
    config = directory.read_config()
    shown = display or Display()
    if directory.files.present(("summary.json",)):
        shown.note(f"{directory.path} is finished; nothing to resume")
        return 0
    kept = config = changed(config, changes) if changes else config
    check_found(config, directory.path)
    if profile:
        config = lay_over(config, [(name, value, "--profile") for name, value in profile.items()])
    check_writers(config)
    with persistent_compilation_cache(config.log.compilation_cache):
        setup = prepare(config)
        check_profile(config, setup.plan.steps)
        check_same(setup.identity())
        with directory.claimed():
            trainer = Trainer(setup, directory, shown)
            if changes:
                directory.write_config(dataclasses.replace(kept, out=str(directory.path)))
            return trainer.run()


# What a signal does when the run is all but over, and what a second one.
_FINISHING = ("writing the result, then stopping", "stop at once")


class Trainer:
    """One run in this process.

    Args:
        setup: what to train on what.
        directory: where it is recorded.
        display: what the user sees.
        callbacks: called with every row of metrics; one that returns True ends the training after the step at hand.
        runner_for: gives what runs the step in place of the runner that was put together, as for a run among several
            (mora_jax/sweeps).
        measure: see `Evaluator`.

    Attributes:
        summary: what `summary.json` holds, once the run is done.
    """

    def __init__(
        self,
        setup: Setup,
        directory: RunDirectory,
        display: Display,
        callbacks: Sequence[Callback] = (),
        runner_for: Callable[[Assembly], Any] | None = None,
        measure: Measure | None = None,
    ):
        self.setup, self.directory, self.display = setup, directory, display
        self.callbacks, self.summary = tuple(callbacks), dict[str, Any]()
        self._enough = False  # whether a callback has said so
        self.config = config = setup.config
        made = assemble(setup.model, config, setup.plan.steps, setup.mesh)
        self.structure, self.placement, restarts = made.structure, made.placement, made.restarts
        self.state: TrainState = made.placed_state(config.seed)
        self.runner: Any = made.runner if runner_for is None else runner_for(made)
        self.frozen = self.runner.place(made.frozen)
        self.restarter: Restarter | None = None
        if restarts is not None:
            whole = self.runner.whole((self.state, self.frozen))
            self.restarter = Restarter(self.structure, restarts, *whole)
        lengths, kl = setup.train.lengths, config.loss.kl_weight > 0
        packed = packed_sizes(setup.model)
        flops = StepFlops.of(setup.model.config, made.adapters, made.frozen, lengths, kl=kl, packed=packed)
        devices, steps = self.runner.devices, setup.plan.steps
        self.observer = Observer(config, directory, display, flops=flops, devices=devices, steps=steps)
        partitioner = None if made.placement is None else made.placement.partitioner
        self.evaluator = Evaluator(setup, self.observer, display, self._call, partitioner, measure)
        self.step_rows = StepRows(
            config, self.observer, display, made.budget, self._seconds_left, self._call, steps, self.runner.read
        )
        self.watchdog = Watchdog(config.train.watchdog_seconds, self._report_hang)
        self._lengths = len(setup.plan.lengths(setup.batches.length))

    def run(self) -> int:
        """Trains to the end, or to the step boundary after a signal; returns the exit code."""
        with (
            StopSignals(Agreement() if several() else None, self.display.note) as signals,
            contextlib.closing(self.work(signals)) as work,
        ):
            after: Any = None
            while True:
                try:
                    batch = work.send(after)
                except StopIteration as end:
                    return end.value
                after = self.runner(self.state, self.frozen, batch)

    def work(self, signals: StopSignals) -> Generator[Batch, tuple[TrainState, StepMetrics], int]:
        """The run, but for the steps themselves: yields each batch, and is sent the state after it and its metrics.

        Args:
            signals: in place; their stop is looked for after each step.

        Returns:
            The exit code.
        """
        started = time.perf_counter()
        plan, settings = self.setup.plan, self.config.train
        self.runner.while_compiling = functools.partial(self._compiling, signals)
        self.directory.files.note = self.display.note
        if self.directory.writes and not self.directory.files.remote:
            self.directory.checkpoints.mkdir(parents=True, exist_ok=True)
        with (
            self.display,
            self._checkpoints() as checkpoints,
            contextlib.ExitStack() as context,
        ):
            found = checkpoints.newest(self.runner.whole(self.state), self._base)
            first = 0 if found is None else found.step
            if found is not None:
                self.state, self.frozen = self.runner.place(found.state), self.frozen | self.runner.place(found.base)
                del found
            share = self.runner.share(self.setup.micro_batch)
            source = dataclasses.replace(self.setup.batches, rows=share.rows)
            batches = BatchIterator(source, first, place=share.place)
            context.enter_context(contextlib.closing(batches))
            context.callback(self.directory.files.close)
            self._remember(self.directory.rewind_metrics(first), checkpoints)
            info = self.setup.info(first)
            out, attention = str(self.directory.path), self._attention()
            self.display.start(dataclasses.replace(info, out=out, attention=attention))
            context.enter_context(self.observer.open(first))
            for note in self.placement.notes() if self.placement is not None else ():
                self.display.note(note)
            if self.evaluator.owed(first):
                self.evaluator(self.trained_model(), first, signals)
                if first:
                    checkpoints.scored(first, self.evaluator.row.get("eval_loss"))
                self.observer.clock.restart()
                if signals.received:
                    return self._stopped(first, signals)
                self.display.loading("compiling")
            pending: tuple[int, StepMetrics] | None = None
            context.enter_context(self.watchdog)
            for step in range(first, plan.steps):
                self.watchdog.begin(step + 1)
                if step + 1 == plan.steps and not self.evaluator.due(plan.steps):
                    signals.words = _FINISHING
                with self.observer.step(step + 1):
                    batch = self._next(batches)
                    self.state, metrics = yield batch
                    self.observer.sent(step + 1, self.runner.compilation_log)
                    # Metrics are read a step late, so the device always has the next step in its queue.
                    self._report(pending)
                pending = (step + 1, metrics)
                done = step + 1
                last = self._is_last(done)
                signals.look()
                evaluate = self.evaluator.due(done)
                save = settings.save_every and (last or done % settings.save_every == 0)
                restart = self.restarter is not None and self.restarter.restarts.due(done)
                trace_ends = self.observer.ends_trace(done)
                if last or evaluate or save or restart or trace_ends or signals.received:
                    self._report(pending)
                    pending = None
                    if trace_ends:
                        self.observer.end_trace()
                    with self.watchdog.paused():
                        if restart:
                            self._restart(done)
                        if evaluate and not signals.received:
                            self.evaluator(self.trained_model(), done, signals)
                    eval_loss = self.evaluator.loss_after(done)
                    # A stop in the last step finishes the run, unless an evaluation would have to be waited for.
                    stops = signals.received and (not last or self.evaluator.owed(done))
                    if save or stops or checkpoints.is_best(eval_loss):
                        wait = bool(last or signals.received)
                        self.directory.files.flush()
                        state, base = self.runner.whole(self.state), self._base(done)
                        checkpoints.save(state, base, eval_loss=eval_loss, wait=wait)
                    self.observer.clock.restart()
                    if stops:
                        return self._stopped(done, signals)
                if last:
                    break
            self.watchdog.begin(None)
            signals.words = _FINISHING
            self._finish(started, checkpoints)
            return signals.exit_code if signals.look() else 0

    def _attention(self) -> str:
        """What computes attention, in words; of rows as long as they get."""
        model, setup = self.setup.model, self.setup
        partitioner = None if self.placement is None else self.placement.partitioner
        sizes = setup.micro_batch, setup.batches.length
        rows = Rows(model.config, model.dtype, *sizes, partitioner, self.config.data.packing)
        # Under pmap each device computes its rows alone.
        with contextlib.nullcontext() if self.placement is not None else compiling_for(backend()):
            return "xla" if model.attention is None else model.attention.implementation(rows)

    def _stopped(self, done: int, signals: StopSignals) -> int:
        """Says how the run goes on; returns the exit code."""
        owed = ", before its evaluation" if self.evaluator.owed(done) else ""
        how = f"; continue with --resume {self.directory.path}" if self.directory.kept else ""
        self.display.note(f"stopped after step {done}{owed}{how}")
        return signals.exit_code

    @contextlib.contextmanager
    def _compiling(self, signals: StopSignals, length: int) -> Iterator[None]:
        """While the step is compiled for rows of `length` tokens; what is shown and said meanwhile."""
        number, before = self.runner.compilations + 1, signals.words
        signals.words = ("stopping after this compilation and its step", "stop without saving")
        if self._lengths > 1:
            ordinal = f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"
            self.display.waiting(f"compiling for rows of {length} ({ordinal} of {self._lengths} lengths)")
        try:
            with self.watchdog.paused():
                yield
        finally:
            signals.words = before
            self.display.waiting("")

    def _seconds_left(self, step: int) -> float:
        """Those after `step` that no steps take: of evaluations, and of compiling for lengths that haven't come yet."""
        compiled = self.runner.compilation_log
        seconds = self.runner.compile_seconds / max(len(compiled), 1)
        return self.evaluator.seconds_left(step) + max(self._lengths - len(compiled), 0) * seconds

    def _is_last(self, done: int) -> bool:
        """Whether the run ends after so many steps: they are all, or a callback has had enough."""
        if self._enough:
            self.step_rows.last_step = self.evaluator.last_step = done
        return done == self.step_rows.last_step

    def _report_hang(self, text: str) -> None:
        self.display.note(text)
        self.directory.append_hang(text)

    def _checkpoints(self) -> Checkpoints | NoCheckpoints:
        if not self.directory.kept:
            return NoCheckpoints()
        adapters = self.runner.whole(self.state).adapters
        identity = run_identity(self.setup, adapters, self.restarter and self.restarter.restarts)
        settings = self.config.train
        best = settings.keep_best if self.setup.evaluation is not None else 0
        return Checkpoints(self.directory.checkpoints, settings.keep, identity, keep_best=best, note=self.display.note)

    def _remember(self, rows: list[dict[str, Any]], checkpoints: Checkpoints | NoCheckpoints) -> None:
        """Takes up what the rows of the steps before a resumption say."""
        for row in rows:
            self.step_rows.remember(row)
            if any(name.startswith("eval_") for name in row):
                self.evaluator.row = row
                checkpoints.scored(row["step"], row.get("eval_loss"))

    def _restart(self, done: int) -> None:
        """Folds the adapters into the base and reinitialises them."""
        assert self.restarter is not None, "only runs with restarts get here"
        state, frozen = self.restarter(*self.runner.whole((self.state, self.frozen)))
        self.state, self.frozen = self.runner.place(state), self.runner.place(frozen)
        number = self.restarter.restarts.count(done)
        self.display.note(f"restart {number} after step {done}: adapters merged into the base and reinitialised")

    def _base(self, done: int) -> Arrays:
        """The frozen arrays that restarts have changed in the first `done` steps.

        None before the first restart, except where the best checkpoint may have to bring back what was then.
        """
        if self.restarter is None or not (self.config.train.keep_best or self.restarter.restarts.count(done)):
            return {}
        return self.restarter.base(self.runner.whole(self.frozen))

    def _next(self, batches: BatchIterator) -> Batch:
        """The next batch; the time that the loop had to wait for it is counted."""
        asked = time.perf_counter()
        batch = next(batches)
        self.observer.clock.waited_for_data(asked)
        return batch

    def _report(self, pending: tuple[int, StepMetrics] | None) -> None:
        """Waits for a step's metrics and records them."""
        if pending is not None:
            self.step_rows(*pending)

    def _call(self, row: dict[str, Any]) -> None:
        for callback in self.callbacks:
            answer = callback(dict(row))
            # A True of any kind, numpy's and jax's too; other values that count as true are no answer.
            self._enough |= answer is True or (getattr(answer, "dtype", None) == np.bool_ and bool(answer))

    def trained_model(self) -> Decoder:
        """The model as trained so far."""
        adapters = self.runner.whole(self.state).adapters
        return self.structure.model(adapters, self.runner.whole(self.frozen))

    def _write_result(self, name: str) -> None:
        """Writes the adapter or the model as trained so far into a folder of the run."""
        if not self.directory.kept:
            return
        restarted = self.restarter is not None
        files, write = self.directory.files, self.directory.writes

        def write_to(out: Path) -> None:
            model, tokenizer = self.trained_model(), self.setup.tokenizer
            write_result(model, out, self.config, tokenizer, restarted=restarted, write=write)

        with files.folder(name, write=write) as out:
            if several():
                write_to(out)  # each try gathers from all of them
            else:
                saved = self.config.train.save_every > 0  # a checkpoint has the last step
                write_with_retries(write_to, out, files, rescue=not saved)

    def _write_best(self, checkpoints: Checkpoints | NoCheckpoints) -> dict[str, Any]:
        """Writes what the best checkpoint gives, where it isn't the last; returns what the summary says of it."""
        best = checkpoints.best()
        if best is None:
            return {}
        assert isinstance(checkpoints, Checkpoints), "there is a best one only where some are written"
        (step, loss), name = best, result_name(self.config)
        if step != self.step_rows.last_step:
            found = checkpoints.restore(step, self.runner.whole(self.state), self._base(step))
            self.state, self.frozen = self.runner.place(found.state), self.frozen | self.runner.place(found.base)
            name = self.directory.best.name
            self._write_result(name)
        return {"best_step": step, "best_eval_loss": loss, "best": name}

    def _finish(self, started: float, checkpoints: Checkpoints | NoCheckpoints) -> None:
        """Writes the result and the summary."""
        self.display.loading("saving")
        self._write_result(result_name(self.config))
        summary = {
            "method": self.config.adapter.method,
            "trainable_parameters": self.setup.attached.trainable,
            "total_parameters": self.setup.attached.total,
            "steps": self.step_rows.last_step,
            "compilations": self.runner.compilations,
            "compile_seconds": self.runner.compile_seconds,
            **(self.restarter.summary(self.setup.plan.steps) if self.restarter is not None else {}),
            **self.observer.summary(),
            "trained_fraction": self.setup.train.report.trained_fraction,
            "padding": self.setup.plan.padding(self.setup.batches.length),
            "final_loss": None if math.isnan(self.step_rows.last_loss) else self.step_rows.last_loss,
            "eval_loss": self.evaluator.row.get("eval_loss"),
            "eval_perplexity": self.evaluator.row.get("eval_perplexity"),
            "eval_data": None if self.setup.evaluation is None else self.setup.evaluation.fingerprint(),
            **self.evaluator.of_tasks,
            **self._write_best(checkpoints),
            "wall_seconds": time.perf_counter() - started,
            "result": str(self.directory.path / result_name(self.config)) if self.directory.kept else None,
        }
        self.observer.finish(summary)
        self.directory.files.flush()  # a run with a summary has all its rows
        self.directory.write_json("summary.json", summary)
        self.display.finish(summary)
        self.summary = summary
