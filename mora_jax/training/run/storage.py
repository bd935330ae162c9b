"""The files of a run's folder, on a disk or in a bucket: each written whole, or growing line by line.

What disks, network folders and buckets do to a run is told in words, and tried again where that may help.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

from etils import epath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from mora_jax.errors import InputError
from mora_jax.paths import is_local, local_path, replacing

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
    if isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "errno", None) in _PERMANENT:
        return True
    return any(word in str(error) for word in _PERMANENT_WORDS)


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


#: What a kind of bucket needs: the package that reaches it, and the extra that installs it.
BUCKETS = {"gs": ("gcsfs", "gcs")}


def open_files(path: str | os.PathLike[str]) -> Files:
    """The files of a folder.

    Args:
        path: a local path, or `gs://bucket/folder`.

    Raises:
        InputError: another kind of bucket, or the package for this one isn't installed.
    """
    if is_local(path):
        return Files(local_path(path))
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in BUCKETS:
        kinds = ", ".join(f"{kind}://" for kind in BUCKETS)
        raise InputError(f"{path}: runs can be kept in a local folder or on {kinds}, not on {scheme}://")
    package, extra = BUCKETS[scheme]
    if find_spec(package) is None:
        raise InputError(f"{path}: {scheme}:// needs the package {package}: pip install 'mora-jax[{extra}]'")
    return BucketFiles(epath.Path(path))


class Files:
    """Files of a local folder.

    Attributes:
        path: the folder.
        note: is told of tries that failed.
    """

    remote = False
    hint = "make room there or fix its permissions, then continue with --resume"
    attempts = 4

    def __init__(self, path: Any):
        self.path = path
        self.note: Callable[[str], None] = lambda text: None

    def _retry(self, action: Callable[[], T], name: str, what: str) -> T:
        with silenced_loggers() if self.remote else contextlib.nullcontext():
            # A folder that can't be made has no run yet.
            hint = self.hint.partition(", then ")[0] if what == "made" else self.hint
            return with_retries(action, f"{self.path / name} can't be {what}", hint, self.note, attempts=self.attempts)

    def make(self) -> None:
        """Makes the folder."""
        self._retry(lambda: self.path.mkdir(parents=True, exist_ok=True), "", "made")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other processes from claiming the folder, which must be there; a process that dies gives it back.

        Raises:
            InputError: another one has it.
        """
        if fcntl is None or self.remote:  # objects of a bucket know no locks
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another run is writing to {self.path} at this moment: wait for its end, or choose another folder"
                ) from None
            except OSError:
                pass  # a network folder without locks
            yield
        finally:
            os.close(folder)

    def names(self, folder: str = "") -> list[str]:
        """The names of what is in a folder; none where there is no such folder."""
        path = self.path / folder
        entries = self._retry(lambda: list(path.iterdir()) if path.is_dir() else [], folder, "read")
        return sorted(entry.name for entry in entries)

    def present(self, names: tuple[str, ...]) -> list[str]:
        """Those of these files and folders that are there."""
        there = self.names()
        return [name for name in names if name in there]

    def read(self, name: str) -> bytes | None:
        """What a file holds; None where there is none."""
        file = self.path / name
        return self._retry(lambda: file.read_bytes() if file.is_file() else None, name, "read")

    def write(self, name: str, text: str) -> None:
        """Writes a file, whole or not at all."""

        def write_beside() -> None:
            with replacing(self.path / name) as beside:
                beside.write_text(text, encoding="utf-8")

        self._retry(write_beside, name, "written")

    def append(self, name: str, text: str) -> None:
        """Adds whole lines to a file, all or none of them."""
        file = self.on_disk(name)

        def add() -> None:
            size = file.stat().st_size if file.exists() else 0
            try:
                with file.open("a", encoding="utf-8") as opened:
                    opened.write(text)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.truncate(file, size)
                raise

        self._retry(add, name, "written")

    def remove(self, name: str) -> None:
        """Removes a file or a folder, if it is there."""

        def gone() -> None:
            target = epath.Path(self.path / name)
            if target.is_dir():
                target.rmtree()
            elif target.exists():
                target.unlink()

        self._retry(gone, name, "removed")

    def on_disk(self, name: str) -> Path:
        """Where on this machine's disk programs may write a file or a folder step by step: itself, of a local run."""
        return self.path / name

    def flush(self) -> None:
        """Writes what `append` and programs in `on_disk` have held back: nothing here."""

    def close(self) -> None:
        """Flushes for the last time."""
        self.flush()

    @contextlib.contextmanager
    def folder(self, name: str, *, write: bool = True) -> Iterator[Path]:
        """Where a folder of this name is to be written; of several processes only one does."""
        yield self.path / name


class BucketFiles(Files):
    """Files in a bucket, which knows no appending: what grows, grows on this machine's disk and is copied from there.

    That happens every 30 seconds at most, and with every `flush`: before each checkpoint, so that a run which goes on
    from it finds the rows of all its steps.
    """

    remote = True
    hint = "see that the bucket exists and can be reached, and that you may write there"
    attempts = 2  # the client has tried several times itself before it gives up
    interval = 30.0

    def __init__(self, path: Any):
        super().__init__(path)
        self._disk: tempfile.TemporaryDirectory[str] | None = None
        self._copied: dict[Path, tuple[int, int]] = {}  # size and time of files when they were copied last
        self._flushed = time.monotonic()

    def on_disk(self, name: str) -> Path:
        if self._disk is None:
            self._disk = tempfile.TemporaryDirectory(prefix="mora-jax-")
        return Path(self._disk.name) / name

    def write(self, name: str, text: str) -> None:
        # An object appears whole or not at all.
        self._retry(lambda: (self.path / name).write_text(text), name, "written")
        if self._disk is not None:
            self.on_disk(name).unlink(missing_ok=True)

    def append(self, name: str, text: str) -> None:
        if not self.on_disk(name).exists():
            self.on_disk(name).write_bytes(self.read(name) or b"")
        super().append(name, text)
        if time.monotonic() - self._flushed > self.interval:
            self.flush()

    def flush(self) -> None:
        if self._disk is not None:
            self._copy(Path(self._disk.name))
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._disk is not None:
            self._disk.cleanup()
            self._disk = None

    @contextlib.contextmanager
    def folder(self, name: str, *, write: bool = True) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="mora-jax-") as disk:
            yield Path(disk) / name
            if write:
                self._copy(Path(disk))

    def _copy(self, disk: Path) -> None:
        """Copies the files below `disk` that have grown or changed since they were copied last, but for links.

        Somebody may be writing to one meanwhile: it is copied again the next time.
        """
        for file in sorted(disk.rglob("*")):
            if file.is_symlink() or not file.is_file():
                continue
            name, status = file.relative_to(disk), file.stat()
            state = status.st_size, status.st_mtime_ns
            if self._copied.get(file) != state:
                self._retry(functools.partial(_copy_file, file, self.path / name), str(name), "written")
                self._copied[file] = state


def _copy_file(file: Path, target: Any) -> None:
    with file.open("rb") as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 2**23)


class MemoryFiles(Files):
    """Files that are only kept in memory, of a run that writes nothing."""

    remote = True  # nothing local to make

    def __init__(self) -> None:
        super().__init__(Path("(nothing is written)"))
        self._texts: dict[str, str] = {}

    def make(self) -> None:
        pass

    def names(self, folder: str = "") -> list[str]:
        return [] if folder else list(self._texts)

    def read(self, name: str) -> bytes | None:
        return self._texts[name].encode() if name in self._texts else None

    def write(self, name: str, text: str) -> None:
        self._texts[name] = text

    def append(self, name: str, text: str) -> None:
        self._texts[name] = self._texts.get(name, "") + text

    def remove(self, name: str) -> None:
        self._texts.pop(name, None)
