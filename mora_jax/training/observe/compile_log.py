"""What was compiled, when, for which shapes, how long it took, and why it was not the first time."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mora_jax.training.observe.memory import planned_memory

# What jax reports at the end of every compilation (or of its fetching from the cache on disk).
_EVENT = "/jax/core/compile/backend_compile_duration"
#: Other programs than the step have rows of their own from so many seconds on; the many small ones are only summed up.
_LONG = 0.1


@dataclass(frozen=True)
class Compilation:
    """One compilation of the training step.

    Attributes:
        started: `time.time()` at its beginning.
        lower_seconds: tracing in Python and lowering.
        seconds: the compiler's.
        shapes: of the batch, as `int32[1,4,512]` by name.
        compiled: the result.
    """

    started: float
    lower_seconds: float
    seconds: float
    shapes: dict[str, str]
    compiled: Any

    @functools.cached_property
    def memory(self) -> dict[str, int] | None:
        """What the compiler planned, by `planned_memory`."""
        return planned_memory(self.compiled)

    def changed(self, earlier: Sequence[Compilation]) -> list[str]:
        """Why it was needed: what is new in the shapes since the newest of `earlier`; nothing for the first one."""
        return differences(earlier[-1].shapes, self.shapes) if earlier else []

    def row(self, earlier: Sequence[Compilation]) -> dict[str, Any]:
        """As a line of `compile.jsonl`; `earlier` are those before it."""
        return {
            "time": _utc(self.started),
            "what": "training step",
            "seconds": self.lower_seconds + self.seconds,
            "lower_seconds": self.lower_seconds,
            "shapes": self.shapes,
            "changed": self.changed(earlier),
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
        if event == _EVENT:
            self._heard.append((time.time() - duration_secs, str(kwargs.get("fun_name", "unknown")), duration_secs))

    def take(self, compilations: Sequence[Compilation]) -> Sequence[Compilation]:
        """Writes what is new.

        Args:
            compilations: all of the training step's.

        Returns:
            Those of them that are new.
        """
        if not self._heard and len(compilations) == self._seen:
            return ()
        heard, self._heard = self._heard, []
        new = compilations[self._seen :]
        spans = [(one.started, one.started + one.lower_seconds + one.seconds) for one in new]
        rows = [one.row(compilations[: self._seen + number]) for number, one in enumerate(new)]
        for started, name, seconds in heard:
            if any(first <= started <= last for first, last in spans):
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
