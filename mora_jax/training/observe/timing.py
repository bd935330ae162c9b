"""Where the time of a step goes, as the loop sees it, without any synchronisation beyond the loop's own."""

from __future__ import annotations

import time
from typing import NamedTuple


class StepTimes(NamedTuple):
    """Seconds from the moment at which the step before was known to be done to that of this one.

    The three parts make up the whole. The device computes during all of them: the loop sends the next step before it
    waits for this one. So `device > 0` says that the loop was there first and the device was never short of work;
    `device` near 0 says that data (`data_wait`) or the loop (`host`) is what holds the run up.

    Attributes:
        step: the whole.
        data_wait: the loop had no batch to send.
        host: its own work: sending the step, writing metrics, showing them.
        device: it waited for the device.
    """

    step: float = 0.0
    data_wait: float = 0.0
    host: float = 0.0
    device: float = 0.0

    def plus(self, other: StepTimes) -> StepTimes:
        """Part by part."""
        return StepTimes(*(mine + its for mine, its in zip(self, other, strict=True)))

    def row(self) -> dict[str, float]:
        """As keys of `metrics.jsonl` and `summary.json`."""
        return {f"{name}_seconds": seconds for name, seconds in self._asdict().items()}


class StepClock:
    """Measures `StepTimes`.

    Attributes:
        total: of all steps so far.
    """

    def __init__(self) -> None:
        self.total = StepTimes()
        self._steps = 0
        self.restart()

    def restart(self) -> None:
        """The next step's time begins now; for what is no part of a step, such as an evaluation."""
        self._start, self._fresh = time.perf_counter(), True
        self._data = self._device = 0.0

    def first_sent(self) -> None:
        """A step goes to the device now. If it is the first since the last start, that was now; for a loop which others
        may hold up in between."""
        if self._fresh:
            self.restart()
        self._fresh = False

    def exclude(self, seconds: float) -> None:
        """Leaves out what has just taken so long, such as compiling."""
        self._start += seconds

    def waited_for_data(self, since: float) -> None:
        """The loop got its batch now and had asked at `since`, by `time.perf_counter`."""
        self._data += time.perf_counter() - since

    def waited_for_device(self, since: float) -> None:
        """The device's result is there now and the loop had asked at `since`."""
        self._device += time.perf_counter() - since

    @property
    def mean_step(self) -> float:
        """Seconds of a step so far, 0 before the first; compiling and evaluations are no part of it."""
        return self.total.step / max(self._steps, 1)

    def lap(self, now: float | None = None) -> StepTimes:
        """A step is done, now or at `now` by `time.perf_counter`: its times. The next one's begins."""
        now = time.perf_counter() if now is None else now
        seconds = max(now - self._start, 1e-9)
        times = StepTimes(seconds, self._data, max(seconds - self._data - self._device, 0.0), self._device)
        self.total = self.total.plus(times)
        self._steps += 1
        self._start, self._data, self._device = now, 0.0, 0.0
        return times
