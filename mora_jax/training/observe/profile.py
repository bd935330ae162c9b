"""A trace of some steps for XProf: what the host and every device did, operation by operation."""

from typing import Any

import jax

from mora_jax.errors import InputError
from mora_jax.training.config.schema import Config, LogConfig
from mora_jax.training.hooks import Hook, Point, Run

FOLDER = "profile"
# The first step of a process compiles and the second one still warms up.
_WARM_UP = 2


def profiled(log: LogConfig, first_step: int, steps: int) -> range:
    """The numbers of the steps to trace, counted as in `metrics.jsonl`; empty for none.

    Args:
        log: the section; without `profile_first` the trace leaves out two steps of this process to warm up, where the
            run is long enough for that.
        first_step: steps that are done before this process.
        steps: of the whole run.
    """
    if not log.profile_steps:
        return range(0)
    first = log.profile_first
    if first is None:
        first = max(first_step + 1, min(first_step + 1 + _WARM_UP, steps + 1 - log.profile_steps))
    return range(max(first, first_step + 1), min(first + log.profile_steps, steps + 1))


def check_profile(config: Config, steps: int) -> None:
    """Refuses to trace steps that a run doesn't have.

    Raises:
        InputError: names the step and the run's last one.
    """
    first = config.log.profile_first
    if config.log.profile_steps and first is not None and first > steps:
        raise InputError(f"log.profile_first={first} must be at most the run's {steps} steps")


class Profiler(Hook):
    """Traces the steps that `log.profile_steps` asks for, in the process that writes."""

    def __init__(self, run: Run):
        self._run, self._steps = run, range(0)
        self._tracing = self._traced = False
        self._how_to_open = f"xprof --logdir {run.directory.path / FOLDER}"

    def __exit__(self, *exception: Any) -> None:
        self._stop()

    def on_start(self, point: Point) -> Point:
        run, log = self._run, self._run.config.log
        if run.directory.writes and log.profile_steps:
            self._steps = profiled(log, point.step, run.setup.plan.steps)
            if not self._steps:
                run.display.note(f"note: nothing to trace: step {point.step} is done already")
        return point

    def on_begin(self, step: int) -> None:
        if self._steps and step == self._steps.start:
            # Events of Python functions would slow the host, which is measured here, and fill most of the file.
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._run.directory.files.on_disk(FOLDER), profiler_options=options)
            self._tracing = True

    def due(self, step: int, last: bool) -> bool:
        """Whether the trace ends with this step, which has to be done on the device then."""
        return self._tracing and step == self._steps.stop - 1

    def on_pause(self, point: Point) -> Point:
        if self.due(point.step, point.last):
            self._stop()
        return point

    def summary(self, point: Point) -> dict[str, Any]:
        return {"open": {"XProf": self._how_to_open}} if self._traced else {}

    def _stop(self) -> None:
        """Writes the trace, if one is under way, and says how to look at it."""
        if not self._tracing:
            return
        self._tracing, self._traced = False, True
        jax.profiler.stop_trace()
        first, last = self._steps.start, self._steps.stop - 1
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        self._run.display.note(f"trace of {steps} written; open it with: {self._how_to_open}")
