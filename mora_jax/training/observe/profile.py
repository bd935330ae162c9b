"""A trace of some steps for XProf: what the host and every device did, operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from mora_jax.errors import InputError
from mora_jax.training.config.schema import Config, LogConfig

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


class Profile:
    """Starts and ends the trace of one run.

    Args:
        folder: gives the one on this machine's disk where it is written, if there are steps to trace.
        shown: where it is found afterwards.
        steps: their numbers.
        note: shows a line to the user.
    """

    def __init__(self, folder: Callable[[], Path], shown: str, steps: range, note: Callable[[str], None]):
        self._folder, self._shown, self._steps, self._note = folder, shown, steps, note
        self._on = False

    def before(self, step: int) -> None:
        """To be called before a step is sent."""
        if step == self._steps.start and self._steps:
            # Events of Python functions would slow the host, which is measured here, and fill most of the file.
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._folder(), profiler_options=options)
            self._on = True

    def ends(self, step: int) -> bool:
        """Whether the trace ends with this step, which must be done on the device before `stop`."""
        return self._on and step == self._steps.stop - 1

    def stop(self) -> None:
        """Writes the trace and says how to look at it; nothing where none is under way."""
        if not self._on:
            return
        self._on = False
        jax.profiler.stop_trace()
        first, last = self._steps.start, self._steps.stop - 1
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        self._note(f"trace of {steps} written; open it with: {self.how_to_open}")

    @property
    def how_to_open(self) -> str:
        """The command that shows the trace."""
        return f"xprof --logdir {self._shown}"
