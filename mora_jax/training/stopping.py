"""Stop at a step's border when the system or the user asks for it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType


class StopSignals:
    """Turns SIGTERM and SIGINT into a wish that the loop reads at each step's border. A context manager.

    A second SIGINT stops at once.

    Args:
        agree: where the run has several processes: gives the highest of their numbers (see processes.Agreement).

    Attributes:
        received: the signal that came first, or None. In a run of several processes one that any of them received
            and that all know of, so that all stop at the same step.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.received: int | None = None
        self._own: int | None = None
        self._agree = agree
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:  # only the main thread may; elsewhere the process's own handling stays
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def look(self) -> None:
        """Brings `received` up to date; once at every step's border."""
        self.received = self._own if self._agree is None else self._agree(self._own or 0) or None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._own is not None:
            raise KeyboardInterrupt
        self._own = number if self._own is None else self._own

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that ended by the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.received or 0)
