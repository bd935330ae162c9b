"""Reports a step that hangs: what every thread of the process is doing, on stderr and in the run's folder."""

from __future__ import annotations

import contextlib
import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from mora_jax.training.hooks import Hook, Point


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
