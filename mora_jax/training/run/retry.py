"""What disks, network folders and buckets do to a run: errors in words, and another try where that may help."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from time import sleep
from typing import TypeVar

from mora_jax.errors import InputError

T = TypeVar("T")

# No second try helps against these.
_PERMANENT = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_PERMANENT_WORDS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "Permission denied", "Read-only file system", "Forbidden")
# Where the classes of errors of clients of buckets live; none of them has a base in Python itself.
_CLIENTS = ("gcsfs.retry", "aiohttp.client_exceptions", "google.auth.exceptions", "botocore.exceptions")
_CLASSES = ("HttpError", "ClientError", "GoogleAuthError", "BotoCoreError")


def storage_errors() -> tuple[type[Exception], ...]:
    """The classes of errors that reading and writing can raise; those of clients as far as they are loaded.

    TensorStore raises ValueError, with the cause in its text.
    """
    modules = [sys.modules[name] for name in _CLIENTS if name in sys.modules]
    classes = [getattr(module, name) for module in modules for name in _CLASSES if hasattr(module, name)]
    return (OSError, ValueError, *classes)


def reason(error: BaseException) -> str:
    """The error in a few words: what the system said, without the layers that passed it on."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):
        return "it isn't there"
    text = " ".join(str(error).split()).partition(" [")[0]
    return text.rpartition(": ")[2][:200] if "os_error_code" in str(error) else text[:200] or type(error).__name__


def is_permanent(error: BaseException) -> bool:
    """Whether another try is pointless."""
    number = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError | PermissionError):
        return True
    return number in _PERMANENT or any(word in str(error) for word in _PERMANENT_WORDS)


@contextlib.contextmanager
def silenced_loggers() -> Iterator[None]:
    """Keeps what orbax and clients of buckets say to themselves (each error a second time) from a run's stderr."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "gcsfs", "root")]
    levels = [logger.level for logger in loggers]
    hook = sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    except BaseException:
        # Coroutines that were left behind complain when they are collected.
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def with_retries(
    action: Callable[[], T],
    what: str,
    hint: str,
    note: Callable[[str], None],
    *,
    attempts: int = 4,
) -> T:
    """Does something with files, and does it again after 1, 2 and 4 seconds where it fails.

    Args:
        action: what to do; each try does all of it.
        what: the sentence's start, such as "the checkpoint of step 4 can't be written to runs/a".
        hint: how to fix it.
        note: is told of each failed try.
        attempts: tries in all.

    Raises:
        InputError: it failed every time, or in a way that lasts.
    """
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except storage_errors() as error:
            if isinstance(error, InputError):
                raise
            why = reason(error)
            if is_permanent(error) or attempt == attempts:
                times = f" ({attempt} tries)" if attempt > 1 else ""
                raise InputError(f"{what}: {why}{times}; {hint}") from None
            wait = 2.0 ** (attempt - 1)
            note(f"{what}: {why}; trying again in {wait:g} s")
            sleep(wait)
    raise AssertionError("the last try returns or raises")
