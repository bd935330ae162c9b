"""What takes part in a run beside its steps: hooks of one form, which the loop calls in the order of one list."""

from __future__ import annotations

import contextlib
import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

if TYPE_CHECKING:
    from mora_jax.training.build_step import Assembly
    from mora_jax.training.config.schema import Config
    from mora_jax.training.display import Display
    from mora_jax.training.distributed.signals import StopSignals
    from mora_jax.training.observe.compile_log import Compilation
    from mora_jax.training.relora import Restarter
    from mora_jax.training.run.directory import RunDirectory
    from mora_jax.training.setup import Setup
    from mora_jax.training.sharding.runner import RowShare
    from mora_jax.training.state import Arrays
    from mora_jax.training.step import StepMetrics

Row = Mapping[str, Any]
Callback = Callable[[dict[str, Any]], Any]


class Runner(Protocol):
    """What has a run's arrays on the devices: a compiled step of its own, or one that several runs share.

    Attributes:
        devices: those that it runs on, of all processes.
    """

    devices: list[jax.Device]

    @property
    def compilation_log(self) -> list[Compilation]:
        """Every compilation of the step, oldest first."""

    def place(self, tree: Any) -> Any:
        """State or frozen arrays, as the step takes them."""

    def unreplicate(self, tree: Any) -> Any:
        """The other way: the tree without what `place` and the steps added."""

    def share(self, rows: int) -> RowShare:
        """What this process has to make of micro-batches of so many rows, and what places it."""

    def read(self, metrics: Any) -> tuple[StepMetrics, float]:
        """Waits for a step's metrics: numbers on the host, and when they were there, by `time.perf_counter`."""


@dataclass(frozen=True)
class Run:
    """A run in this process: what stays as it is from start to end.

    Attributes:
        setup: what is trained on what.
        directory: where it is recorded.
        display: what the user sees.
        assembly: its step.
        runner: has its arrays.
        signals: ask it to stop.
    """

    setup: Setup
    directory: RunDirectory
    display: Display
    assembly: Assembly
    runner: Runner
    signals: StopSignals

    @property
    def config(self) -> Config:
        """Its configuration."""
        return self.setup.config

    def model(self, point: Point) -> Any:
        """The model as trained at a point."""
        adapters = self.runner.unreplicate(point.state).adapters
        return self.assembly.structure.model(adapters, self.runner.unreplicate(point.frozen))


class Point(NamedTuple):
    """A moment between two steps.

    Attributes:
        step: steps that are done.
        state, frozen: what is trained, and what is not, as the run's runner has them.
        last: whether the run's steps end here.
        evaluation: the row of the evaluation at this point; None where none was made.
        owed: what a signal kept from being done, in words; empty for nothing.
    """

    step: int
    state: Any
    frozen: Arrays
    last: bool = False
    evaluation: Row | None = None
    owed: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing is left to do but to write the result."""
        return self.last and not self.owed


class Hook(contextlib.AbstractContextManager["Hook"]):
    """Takes part in a run, and is a context manager around it. Each method does nothing where a hook has no other.

    Before the first step `remember` gets the rows of metrics from before a resumption, and `on_start` comes once. A
    step begins with `on_begin`; `compiling` is entered around its compilation; its row comes to `on_step` when its
    metrics are read. After a step for which a hook is `due`, after the last one and after a signal the loop pauses: all
    rows are there, and every hook's `on_pause` gets the point that the one before it returned. At the end each adds its
    part to the `summary`, and `on_end` gets the whole one.
    """

    def __exit__(self, *exception: Any) -> None:
        """Nothing to close."""

    def remember(self, row: Row) -> None:
        """Takes up a row of metrics from before a resumption."""

    def on_start(self, point: Point) -> Point:
        """The run is ready for its first step in this process."""
        return point

    def on_begin(self, step: int) -> None:
        """This step, counted from 1, is made next."""

    def compiling(self, length: int) -> contextlib.AbstractContextManager[Any]:
        """Around a compilation of the step for rows of so many tokens."""
        return contextlib.nullcontext()

    def on_step(self, row: Row) -> bool | None:
        """A step is logged; True ends the run after the step at hand."""

    def on_evaluation(self, row: Row) -> bool | None:
        """An evaluation was made; True ends the run after the step at hand."""

    def due(self, step: int, last: bool) -> bool:
        """Whether the loop has to pause after so many steps."""
        return False

    def on_pause(self, point: Point) -> Point:
        """The loop pauses; returns the point with what has changed."""
        return point

    def seconds_left(self, step: int) -> float:
        """What is still to come after so many steps, beside steps, in seconds."""
        return 0.0

    def summary(self, point: Point) -> dict[str, Any]:
        """A part of `summary.json`."""
        return {}

    def on_end(self, summary: Row) -> None:
        """The run is over."""


class Callbacks(Hook):
    """A user's functions, called with every row: one that answers True ends the run one step later."""

    def __init__(self, functions: Sequence[Callback]) -> None:
        self._functions = tuple(functions)

    def on_step(self, row: Row) -> bool:
        answers = [function(dict(row)) for function in self._functions]
        return any(map(_is_true, answers))

    on_evaluation = on_step


def _is_true(answer: Any) -> bool:
    """True of any kind, numpy's and jax's too; other values that count as true are no answer."""
    return answer is True or (getattr(answer, "dtype", None) == np.bool_ and bool(answer))


class CompilingHook(Hook):
    """Says while the step is compiled for which rows that is, and what a signal does meanwhile."""

    def __init__(self, run: Run) -> None:
        self._run, self._lengths = run, len(run.setup.plan.lengths(run.setup.batches.length))

    @contextlib.contextmanager
    def compiling(self, length: int) -> Iterator[None]:
        """Shows the length, where there are several."""
        display, signals = self._run.display, self._run.signals
        number = len(self._run.runner.compilation_log) + 1
        before = signals.announce(("stopping after this compilation and its step", "stop without saving"))
        if self._lengths > 1:
            ordinal = f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"
            display.waiting(f"compiling for rows of {length} ({ordinal} of {self._lengths} lengths)")
        try:
            yield
        finally:
            signals.announce(before)
            display.waiting("")

    def seconds_left(self, step: int) -> float:
        """What is waited for compiling lengths that haven't come yet, as long as for those before."""
        log = self._run.runner.compilation_log
        seconds = sum(one.waited for one in log) / max(len(log), 1)
        return max(self._lengths - len(log), 0) * seconds


class RestartHook(Hook):
    """The restarts of a run."""

    def __init__(self, run: Run, restarter: Restarter):
        self._run, self._restarter = run, restarter

    def due(self, step: int, last: bool) -> bool:
        return self._restarter.restarts.due(step)

    def on_pause(self, point: Point) -> Point:
        if not self.due(point.step, point.last):
            return point
        run, restarts = self._run, self._restarter.restarts
        state, frozen = self._restarter(*run.runner.unreplicate((point.state, point.frozen)))
        number = restarts.count(point.step)
        run.display.note(f"restart {number} after step {point.step}: adapters merged into the base and reinitialised")
        return point._replace(state=run.runner.place(state), frozen=run.runner.place(frozen))

    def summary(self, point: Point) -> dict[str, Any]:
        count = self._restarter.restarts.count(self._run.setup.plan.steps)
        return {"restarts": count, "restart_compile_seconds": self._restarter.compile_seconds}


class Watchdog(Hook):
    """Watches that steps begin often enough; a thread does while the context lasts.

    A hung step is reported once, and the run is left alone: a network may come back, and a debugger can still be
    attached. Code that holds Python's lock and never gives it back stops the watching thread, too; what waits for
    devices, files and other processes doesn't hold it. (`faulthandler.dump_traceback_later` would get past that, but
    has one timer a process and writes to a file alone.)

    Args:
        seconds: how long a step may take; 0 watches nothing.
        report: takes the report, some lines of text.
        clock: gives the time in seconds.
    """

    def __init__(self, seconds: float, report: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._seconds, self._report, self._clock = seconds, report, clock
        self._step: int | None = None
        self._since = clock()
        self._pauses = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def on_begin(self, step: int | None) -> None:
        """A step begins, and the one before has ended; None: there is nothing to watch."""
        with self._lock:
            self._step, self._since = step, self._clock()

    def on_pause(self, point: Point) -> Point:
        self.on_begin(None)
        return point

    @contextlib.contextmanager
    def compiling(self, length: int = 0) -> Iterator[None]:
        """Work of unknown length inside a step; the step's time starts again after it."""
        with self._lock:
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                self._since = self._clock()

    def look(self) -> None:
        """Reports the step if it takes too long and wasn't reported yet; the watching thread does so now and then."""
        with self._lock:
            step, lasts = self._step, self._clock() - self._since
            if step is None or self._pauses or lasts < self._seconds:
                return
            self._step = None
        self._report(
            f"step {step} has not ended after {lasts:.0f} s (train.watchdog_seconds={self._seconds:g}); "
            f"what all threads are doing:\n{stacks()}"
        )

    def _watch(self) -> None:
        while not self._stop.wait(min(5.0, self._seconds / 4)):
            self.look()


def stacks() -> str:
    """The stack of every thread, the most recent call first."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().rstrip("\n")
