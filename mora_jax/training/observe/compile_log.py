"""What was compiled, when, for which shapes, how long it took, and why it was not the first time.

Memory is that of the devices during a run, and of a compiled step as the compiler planned it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax


def device_memory(devices: Sequence[jax.Device]) -> dict[str, int | None]:
    """Bytes on the fullest device now, and at most so far; None on backends without the statistic, such as CPU's."""
    statistics = [stats for stats in map(_stats, devices) if stats]
    used = [int(stats["bytes_in_use"]) for stats in statistics if "bytes_in_use" in stats]
    peak = [int(stats["peak_bytes_in_use"]) for stats in statistics if "peak_bytes_in_use" in stats]
    return {"device_bytes": max(used, default=None), "device_peak_bytes": max(peak, default=None)}


def peak_memory(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """The most on one device where devices have the statistic, else the peak resident size of this process."""
    peak = device_memory(devices)["device_peak_bytes"]
    if peak is not None:
        return {"peak_memory_bytes": peak, "peak_memory_of": "device"}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resident * scale, "peak_memory_of": "process"}


def planned_memory(compiled: Any) -> dict[str, int] | None:
    """Bytes a device that a compiled program takes, by what for; None where the backend doesn't tell.

    `arguments` are weights, state and batch; `outputs` that reuse them (`aliased`) take none of their own; `temporary`
    is activations and everything else that comes and goes. `total` is what must fit.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    sizes = {
        "arguments": int(analysis.argument_size_in_bytes),
        "outputs": int(analysis.output_size_in_bytes),
        "aliased": int(analysis.alias_size_in_bytes),
        "temporary": int(analysis.temp_size_in_bytes),
        "code": int(analysis.generated_code_size_in_bytes),
    }
    return sizes | {"total": sum(sizes.values()) - 2 * sizes["aliased"]}


def _stats(device: jax.Device) -> dict[str, Any] | None:
    # A backend without the statistic returns None or raises, depending on its plugin.
    with contextlib.suppress(NotImplementedError, AttributeError):
        return device.memory_stats()
    return None


# What jax reports at the end of every compilation (or of its fetching from the cache on disk).
_EVENT = "/jax/core/compile/backend_compile_duration"
#: What the names of threads begin with that compile the step for other shapes while it runs.
AHEAD = "compile-ahead"
#: Other programs than the step have rows of their own from so many seconds on; the many small ones are only summed up.
_LONG = 0.1


@dataclass(frozen=True)
class Compilation:
    """One compilation of the training step.

    Attributes:
        started: `time.time()` at its beginning.
        lower_seconds: tracing in Python and lowering.
        compile_seconds: the compiler's.
        shapes: of the batch, as `int32[1,4,512]` by name.
        compiled: the result.
        waited: seconds that the steps waited for it; the rest of it went on beside them.
        changed: what is new in the shapes since the compilation before; empty for the first one.
    """

    started: float
    lower_seconds: float
    compile_seconds: float
    shapes: dict[str, str]
    compiled: Any
    waited: float = 0.0
    changed: Sequence[str] = ()

    @property
    def seconds(self) -> float:
        """What all of it took."""
        return self.lower_seconds + self.compile_seconds

    @functools.cached_property
    def memory(self) -> dict[str, int] | None:
        """What the compiler planned, by `planned_memory`."""
        return planned_memory(self.compiled)

    def row(self) -> dict[str, Any]:
        """As a line of `compile.jsonl`."""
        return {
            "time": _utc(self.started),
            "what": "training step",
            "seconds": self.seconds,
            "lower_seconds": self.lower_seconds,
            "waited_seconds": self.waited,
            "shapes": self.shapes,
            "changed": self.changed,
            "memory_bytes": self.memory,
        }


def shape_words(array: Any) -> str:
    """`int32[1,4,512]`."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is new in a batch's shapes, in words: `input_ids: int32[1,4,64] -> int32[1,4,32]`."""
    names = sorted({*before, *after}, key=lambda name: (name != "input_ids", name))
    pairs = [(name, before.get(name, "absent"), after.get(name, "absent")) for name in names]
    return [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]


class CompileLog:
    """Hears of every compilation in this process and writes `compile.jsonl`. A context manager.

    Args:
        append: takes the lines, as dictionaries.

    Attributes:
        other_seconds: what compiling other programs than the step took: placing arrays, evaluation, restarts.
    """

    def __init__(self, append: Callable[[list[dict[str, Any]]], None]):
        self._append = append
        self._heard: list[tuple[float, str, float]] = []
        self._seen = 0
        self.other_seconds = 0.0

    def __enter__(self) -> CompileLog:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exception: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _EVENT and not threading.current_thread().name.startswith(AHEAD):
            self._heard.append((time.time() - duration_secs, str(kwargs.get("fun_name", "unknown")), duration_secs))

    def take(self, compilations: Sequence[Compilation]) -> Sequence[Compilation]:
        """Writes what is new.

        Args:
            compilations: all of the training step's.

        Returns:
            Those of them that are new.
        """
        new, (heard, self._heard) = compilations[self._seen :], (self._heard, [])
        rows = [one.row() for one in new]
        for started, name, seconds in heard:
            if any(one.started <= started <= one.started + one.seconds for one in new):
                continue  # the step itself
            self.other_seconds += seconds
            if seconds >= _LONG:
                rows.append({"time": _utc(started), "what": name, "seconds": seconds})
        self._seen = len(compilations)
        if rows:
            self._append(sorted(rows, key=lambda row: row["time"]))
        return new


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
