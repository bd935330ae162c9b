"""Stop at a step's border when the system or the user asks for it."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopSignals:
    """Turns SIGTERM and SIGINT into a wish that the loop reads at each step's border. A context manager.

    A second SIGINT stops at once.

    Attributes:
        received: the signal that came first, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
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

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number if self.received is None else self.received

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that ended by the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.received or 0)
