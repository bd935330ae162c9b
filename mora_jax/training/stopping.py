"""Stop at a step's border when the system or the user asks for it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class StopSignals:
    """Turns SIGTERM and SIGINT into a wish that the loop reads at each step's border. A context manager.

    A second SIGINT stops at once: as a KeyboardInterrupt, and where the process is too deep in compiled code or in a
    wait to notice it, two seconds later by ending the process. Whole checkpoints stay whole.

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
        self._watch: _SecondInterrupt | None = None

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:  # only the main thread may; elsewhere the process's own handling stays
                break
        else:
            self._watch = _SecondInterrupt()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._watch is not None:
            self._watch.close()

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


class _SecondInterrupt:
    """Ends the process some time after a second SIGINT, whatever the main thread is doing.

    Python runs handlers of signals only between two lines of the main thread, which may be minutes away while a step
    computes. The interpreter writes the number of a signal into a socket at once, though, and a thread reads it there.
    """

    patience = 2.0

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._before = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        self._ended = threading.Event()
        threading.Thread(target=self._read, name="second interrupt", daemon=True).start()

    def _read(self) -> None:
        received = 0
        with self._ours:
            while numbers := self._ours.recv(64):
                received += len(numbers)
                if received > 1 and signal.SIGINT in numbers:
                    if not self._ended.wait(self.patience):
                        os._exit(128 + signal.SIGINT)
                    return

    def close(self) -> None:
        """From here on signals are the process's own business again."""
        self._ended.set()
        with contextlib.suppress(ValueError):  # not the main thread
            signal.set_wakeup_fd(self._before)
        self._theirs.close()
