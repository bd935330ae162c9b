"""What a user sees of an error, and the exit code that it gives."""

import contextlib
import errno
import os
import signal
import sys

from mora_jax.environment import explain
from mora_jax.errors import InputError
from mora_jax.training.distributed.signals import Stopped, cause

EXIT_INPUT, EXIT_PIPE = 2, 141
SMALLER = "choose fewer rows at once, shorter rows, or a smaller rank or model"
# What the user's disk and paths can do to any command; every other OSError is a bug.
DISK_ERRNOS = {
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EBUSY, errno.ESTALE,
}  # fmt: skip


def report(error: BaseException) -> int | None:
    """Tells the user of an error that is not a bug, in one line; returns the exit code, or None for a bug."""
    if isinstance(error, InputError):
        return _fail(str(error))
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return EXIT_PIPE
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        _drop_stdout()
        return _fail(": ".join(str(part) for part in (error.filename, error.strerror) if part))
    if isinstance(error, MemoryError):
        return _fail(f"out of memory: {error}; {SMALLER}")
    # Backends have no class of their own for it.
    if isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED"):
        first = str(error).splitlines()[0].rstrip(".")
        if os.strerror(errno.ENOSPC) in first:  # they call a full disk so too
            return _fail(first.partition(": ")[2])
        return _fail(f"out of memory: {first}; {SMALLER}")
    if isinstance(error, RuntimeError) and (line := explain(error)) is not None:
        return _fail(line)
    if isinstance(error, KeyboardInterrupt):
        return stopped(signal.SIGINT)
    return stopped(error.number) if isinstance(error, Stopped) else None


def stopped(number: int) -> int:
    """Says that a signal ended the command; returns the exit code."""
    with contextlib.suppress(OSError):  # the terminal may be what is gone
        print(f"stopped by {cause(number)}", file=sys.stderr)
    return 128 + number


def _drop_stdout() -> None:
    # Where nobody can take what is still buffered, keep the interpreter from complaining about it at exit.
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_INPUT
