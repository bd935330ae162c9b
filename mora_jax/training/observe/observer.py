"""Everything that watches a run, behind the few calls that the loop makes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, Self

import jax

from mora_jax.training.config.schema import Config
from mora_jax.training.display.plain import Display
from mora_jax.training.display.summary import bytes_words
from mora_jax.training.hooks import Hook, Point, Row
from mora_jax.training.observe import profile
from mora_jax.training.observe.compile_log import Compilation, CompileLog
from mora_jax.training.observe.flops import CONVENTION, StepFlops, peak_flops
from mora_jax.training.observe.memory import device_memory, peak_memory
from mora_jax.training.observe.timing import StepClock, StepTimes
from mora_jax.training.observe.writers import Background, Writer, open_writers
from mora_jax.training.run.directory import RunDirectory


class Observer(Hook):
    """Times, utilisation, memory, compilations, traces and the writers of one run in this process.

    Only process 0 writes.

    Args:
        config: of the run.
        directory: where it is recorded.
        display: gets notes.
        flops: what a step costs.
        devices: those of the mesh, of all processes.
        steps: of the whole run.

    Attributes:
        clock: splits the time of steps.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        display: Display,
        *,
        flops: StepFlops,
        devices: Sequence[jax.Device],
        steps: int,
    ):
        self._config, self._directory, self._display, self._steps = config, directory, display, steps
        self._flops, self._peak = flops, peak_flops(devices)
        mine = jax.process_index()
        self._devices = [device for device in devices if device.process_index == mine]
        self._writes = mine == 0
        self._writers: list[Writer] = []
        self._background = Background(())
        self._compile_log = CompileLog(directory.append_compilations if self._writes else lambda rows: None)
        self._profile = self._trace(range(0))
        self._planned: dict[str, int] | None = None
        self._traced = False
        self._compilations: Sequence[Compilation] = ()
        self._summary: Row | None = None
        self._tokens, self._needed, self._palm = 0, 0.0, 0.0
        self._open = contextlib.ExitStack()
        self.clock = StepClock()

    def _trace(self, steps: range) -> profile.Profile:
        shown = str(self._directory.path / profile.FOLDER)
        folder = functools.partial(self._directory.files.on_disk, profile.FOLDER)
        return profile.Profile(folder, shown, steps, self._display.note)

    def __enter__(self) -> Self:
        self._open.enter_context(self._compile_log)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def on_start(self, point: Point) -> Point:
        first = point.step
        steps = profile.profiled(self._config.log, first, self._steps) if self._writes else range(0)
        self._profile = self._trace(steps)
        if self._config.log.profile_steps and self._writes and not steps:
            self._display.note(f"note: nothing to trace: step {first} is done already")
        if self._writes:
            self._writers = open_writers(self._config, self._directory, first)
            self._background = Background(self._writers)
            self._open.callback(lambda: self._background.close(self._summary))
        self._open.callback(self._profile.stop)
        return point

    def on_begin(self, step: int) -> None:
        self._profile.before(step)

    def sent(self, number: int, compilations: Sequence[Compilation]) -> None:
        """A step was sent to the device, which took the compilations so far."""
        self._compilations = compilations
        for one in self._compile_log.take(compilations):
            seconds = one.lower_seconds + one.seconds
            # Compiling is reported on its own; it is no part of any step's time.
            self.clock.exclude(seconds)
            planned = one.memory
            self._planned = max((self._planned, planned), key=lambda found: found["total"] if found else 0)
            # One change tells why; compile.jsonl has all of them.
            changed = one.changed(compilations[: compilations.index(one)])[:1]
            again = f" again for step {number} ({changed[0]})" if changed else ""
            size = f"; it takes {bytes_words(planned['total'])} a device" if planned else ""
            self._display.note(f"compiled the training step{again} in {seconds:.1f} s{size}")

    def due(self, step: int, last: bool) -> bool:
        """Whether the trace ends with this step."""
        return self._profile.ends(step)

    def on_pause(self, point: Point) -> Point:
        if self._profile.ends(point.step):
            self._profile.stop()
            self._traced = True
        return point

    def lap(self, now: float, tokens: int, trained_tokens: int) -> StepTimes:
        """A step was found done on the device at `now`, by `time.perf_counter`."""
        self._tokens += tokens
        self._needed += self._flops.needed(tokens, trained_tokens)
        self._palm += self._flops.palm(tokens)
        return self.clock.lap(now)

    def measures(self, times: StepTimes, tokens: int, trained_tokens: int) -> dict[str, Any]:
        """What a row of `metrics.jsonl` says of the machine; `mfu` is None where the devices' peak isn't known."""
        needed = self._flops.needed(tokens, trained_tokens)
        return {
            "tokens_per_second": tokens / times.step,
            "mfu": self._share(needed, times.step),
            **times.row(),
            **device_memory(self._devices),
        }

    def on_step(self, row: Row) -> None:
        """Adds a row to `metrics.jsonl` and to whatever else is written."""
        if self._writes:
            self._directory.append_metrics([row])
        self._background.write(row)

    on_evaluation = on_step

    def summary(self, point: Point) -> dict[str, Any]:
        """What is said of the machine: of the steps of this process."""
        self._compile_log.take(self._compilations)
        total = self.clock.total
        opened = {writer.name: writer.how_to_open for writer in self._writers}
        if self._traced:
            opened["XProf"] = self._profile.how_to_open
        return {
            "tokens_per_second": self._tokens / total.step if total.step else None,
            "mfu": self._share(self._needed, total.step),
            "mfu_convention": CONVENTION,
            "mfu_palm": self._share(self._palm, total.step),
            "flops_per_token": self._needed / self._tokens if self._tokens else None,
            "flops_per_token_palm": self._flops.palm(1),
            "peak_flops": self._peak,
            **total.row(),
            "other_compile_seconds": self._compile_log.other_seconds,
            "step_memory_bytes": self._planned,
            **peak_memory(self._devices),
            "open": opened,
        }

    def on_end(self, summary: Row) -> None:
        self._summary = summary  # for the writers, when they are closed

    def _share(self, flops: float, seconds: float) -> float | None:
        return flops / seconds / self._peak if self._peak and seconds else None
