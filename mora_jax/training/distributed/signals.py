"""Stop when the system or the user asks for it: a command at once and cleanly, a run at a step boundary."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

#: The signals that ask a process to stop. Of these, SIGHUP comes when a terminal or a connection is closed.
ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(SystemExit):
    """A signal other than SIGINT ends the command; raised wherever the main thread is, so that all cleaning up runs.

    Attributes:
        number: the signal.
        code: the exit code, 128 + number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def cause(number: int) -> str:
    """What a user calls a signal: Ctrl-C, or its name."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class _Handled:
    """A context manager during which a subclass hears of signals, at once.

    Python runs handlers only between two lines of the main thread, which may be minutes away while a step computes. The
    interpreter writes the number of a signal into a socket at once, though, and a thread reads it there. It tells of
    the first one, and ends the process some time after a second SIGINT, whatever the main thread is doing.
    """

    patience = 2.0
    #: Seconds that the thread waits before it tells.
    delay = 0.0

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._ended = threading.Event()
        self._theirs: socket.socket | None = None
        self._repeated = 0
        self._raised = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread."""
        raise NotImplementedError  # abstract: each handler of signals defines it

    def _told(self, number: int) -> None:
        """Called from the thread, with the first signal."""
        raise NotImplementedError  # abstract: each handler of signals defines it

    def __enter__(self) -> Self:
        """Puts the handlers in place; in a thread other than the main one nothing happens, for nothing may."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in ASKING:
            # Whoever started the process may want it to ignore one: nohup, and shells for what is in the background.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._receive)
        ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._lost
        threading.Thread(target=self._read, args=(ours,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        """From here on signals are again the business of whose they were."""
        if self._theirs is None:
            return
        self._ended.set()
        sys.unraisablehook = self._unraisable
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._theirs.close()

    def _read(self, ours: socket.socket) -> None:
        first = True
        with ours:
            while numbers := ours.recv(64):
                for number in (number for number in numbers if number in self._before):
                    if self._repeated:
                        self._repeated -= 1
                    elif first:
                        first = False
                        if not self._ended.wait(self.delay):
                            with contextlib.suppress(Exception):  # nobody reads it any more
                                self._told(number)
                    elif number == signal.SIGINT:
                        if not self._ended.wait(self.patience):
                            _leave()
                        return

    def _postponed(self, number: int, frame: FrameType | None) -> bool:
        """Whether nothing may be raised now, for something is being imported; the handler is then called again soon.

        Extensions that are being imported lose exceptions, make others of them, or crash.
        """
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                self._soon(number)
                return True
            frame = frame.f_back
        return False

    def _lost(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Raises again what was raised into a finalizer or the garbage collector, where Python drops it."""
        if self._raised and isinstance(unraisable.exc_value, (KeyboardInterrupt, Stopped)):
            self._raised = False
            self._soon(getattr(unraisable.exc_value, "number", signal.SIGINT))
        elif not self._raised:
            self._unraisable(unraisable)

    def _soon(self, number: int) -> None:
        again = threading.Timer(0.05, self._repeat, (number,))
        again.daemon = True
        again.start()

    def _repeat(self, number: int) -> None:
        if not self._ended.is_set():
            self._repeated += 1
            signal.pthread_kill(threading.main_thread().ident or 0, number)


def _leave() -> None:
    """Ends the process without any cleaning up."""
    with contextlib.suppress(OSError):
        # A live display has hidden the cursor.
        os.write(2, b"\x1b[?25h\nstopped at once\n" if os.isatty(2) else b"stopped at once\n")
    os._exit(128 + signal.SIGINT)


class Stoppable(_Handled):
    """Lets the first signal end a command: a context manager.

    SIGINT becomes a KeyboardInterrupt, the others `Stopped`. Further signals don't disturb the cleaning up; where the
    process hasn't ended two seconds after a second SIGINT, it is ended as it stands.

    Args:
        tell: called, from another thread, with words about the stop where it isn't done soon.

    Attributes:
        received: the signal that came first, or None. What is raised for it may reach the caller as something else:
            an extension that is being imported makes an ImportError of it.
    """

    delay = 0.7

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.received: int | None = None
        self._tell = tell

    def _told(self, number: int) -> None:
        self._tell("stopping; again to stop at once")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if self._raised or self._postponed(self.received, frame):
            return
        self._raised = True
        raise KeyboardInterrupt if self.received == signal.SIGINT else Stopped(self.received)


#: What a first signal and a second one do, in words.
Announcement = tuple[str, str]
AFTER_STEP: Announcement = ("stopping after this step", "stop without saving")
FINISHING: Announcement = ("writing the result, then stopping", "stop at once")


class StopSignals(_Handled):
    """Turns signals into a stop request that the loop reads after each step. A context manager.

    A second SIGINT stops at once: as a KeyboardInterrupt, and where the process is too deep in compiled code or in a
    wait to notice it, two seconds later by ending the process. Whole checkpoints stay whole.

    Args:
        agree: where the run has several processes: gives the highest of their numbers (see processes.Agreement).
        tell: called, from another thread, with what was announced last when the first signal comes.

    Attributes:
        received: the signal that came first, or None. In a run of several processes one that any of them received
            and that all know of, so that all stop at the same step.
        several: whether the run has several processes.
    """

    def __init__(
        self, agree: Callable[[int], int] | None = None, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        super().__init__()
        self.received: int | None = None
        self.several = agree is not None
        self._announced = AFTER_STEP
        self._own: int | None = None
        self._agree, self._tell = agree, tell

    def announce(self, what: Announcement) -> Announcement:
        """Sets what will happen after the first signal, and after the second, as things are now; returns what was."""
        before, self._announced = self._announced, what
        return before

    def look(self) -> int | None:
        """Brings `received` up to date and returns it; all processes of a run do so equally often."""
        self.received = self._own if self._agree is None else self._agree(self._own or 0) or None
        return self.received

    def _told(self, number: int) -> None:
        first, second = self._announced
        self._tell(f"{first}; again to {second}" if number == signal.SIGINT else f"{cause(number)}: {first}")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._own is None:
            self._own = number
        elif number == signal.SIGINT and not self._raised and not self._postponed(number, frame):
            self._raised = True
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that ended by the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.received or 0)
