"""The files of a run's folder, on a disk or in a bucket: each written whole, or growing line by line."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from mora_jax.errors import InputError
from mora_jax.paths import is_local, local_path
from mora_jax.training.run.retry import silenced_loggers, with_retries

T = TypeVar("T")

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
            return with_retries(
                action, f"{self.path / name} can't be {what}", self.hint, self.note, attempts=self.attempts
            )

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

    def present(self, names: tuple[str, ...]) -> list[str]:
        """Those of these files and folders that are there."""
        return self._retry(lambda: [name for name in names if (self.path / name).exists()], "", "read")

    def read(self, name: str) -> bytes | None:
        """What a file holds; None where there is none."""

        def content() -> bytes | None:
            file = self.path / name
            return file.read_bytes() if file.is_file() else None

        return self._retry(content, name, "read")

    def write(self, name: str, text: str) -> None:
        """Writes a file, whole or not at all."""

        def write_beside() -> None:
            beside = self.path / f".{name}.tmp"
            try:
                beside.write_text(text, encoding="utf-8")
                beside.replace(self.path / name)
            except BaseException:  # a signal's, too
                beside.unlink(missing_ok=True)
                raise

        self._retry(write_beside, name, "written")

    def append(self, name: str, text: str) -> None:
        """Adds whole lines to a file, all or none of them."""
        file = self.path / name

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

    def flush(self) -> None:
        """Writes what `append` and folders of `on_disk` still hold back: nothing here."""

    def close(self) -> None:
        """Flushes for the last time."""
        self.flush()

    def on_disk(self, name: str) -> Path:
        """A folder on this machine's disk for programs that write there step by step: itself, of a local run."""
        return self.path / name

    def names(self, folder: str) -> list[str]:
        """The names of what is in a folder; none where there is no such folder."""
        path = self.path / folder
        entries = self._retry(lambda: list(path.iterdir()) if path.is_dir() else [], folder, "read")
        return sorted(entry.name for entry in entries)

    def remove(self, name: str) -> None:
        """Removes a file or a folder, if it is there."""

        def gone() -> None:
            target = epath.Path(self.path / name)
            if target.is_dir():
                target.rmtree()
            elif target.exists():
                target.unlink()

        self._retry(gone, name, "removed")

    @contextlib.contextmanager
    def folder(self, name: str, *, write: bool = True) -> Iterator[Path]:
        """Where a folder of this name is to be written; of several processes only one does."""
        yield self.path / name


class Mirror:
    """A folder on this machine's disk, for programs that write to disks alone, copied into a bucket now and then.

    Args:
        folder: on the disk; what links to somewhere else is left out.
        put: copies one file, given its path and its name below the folder.
    """

    def __init__(self, folder: Path, put: Callable[[Path, str], None]):
        self.folder = folder
        self._put = put
        self._copied: dict[str, tuple[int, int]] = {}

    def copy(self) -> None:
        """Copies the files that have grown or changed since they were copied last.

        Somebody may be writing to one meanwhile: it is copied again the next time.
        """
        for file in sorted(self.folder.rglob("*")):
            if file.is_symlink() or not file.is_file():
                continue
            name, status = str(file.relative_to(self.folder)), file.stat()
            state = status.st_size, status.st_mtime_ns
            if self._copied.get(name) != state:
                self._put(file, name)
                self._copied[name] = state


class BucketFiles(Files):
    """Files in a bucket, which knows no appending: a file that grows is kept in memory and rewritten.

    That happens every 30 seconds at most, and with every `flush`: before each checkpoint, so that a run which goes on
    from it finds the rows of all its steps. Folders of `on_disk` are copied at the same times.
    """

    remote = True
    hint = "see that the bucket exists and can be reached, and that you may write there"
    attempts = 2  # the client has tried several times itself before it gives up
    interval = 30.0

    def __init__(self, path: Any):
        super().__init__(path)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._mirrors: dict[str, Mirror] = {}
        self._growing: dict[str, str] = {}
        self._unwritten: set[str] = set()
        self._written = time.monotonic()

    def write(self, name: str, text: str) -> None:
        # An object appears whole or not at all.
        self._retry(lambda: (self.path / name).write_text(text), name, "written")
        self._growing.pop(name, None)
        self._unwritten.discard(name)

    def append(self, name: str, text: str) -> None:
        if name not in self._growing:
            self._growing[name] = (self.read(name) or b"").decode("utf-8", "replace")
        self._growing[name] += text
        self._unwritten.add(name)
        if time.monotonic() - self._written > self.interval:
            self.flush()

    def flush(self) -> None:
        for name in sorted(self._unwritten):
            text = self._growing[name]
            self.write(name, text)
            self._growing[name] = text
        for mirror in self._mirrors.values():
            mirror.copy()
        self._written = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._mirrors.clear()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def on_disk(self, name: str) -> Path:
        if name not in self._mirrors:
            if self._scratch is None:
                self._scratch = tempfile.TemporaryDirectory(prefix="mora-jax-")
            self._mirrors[name] = self._mirror(self._scratch.name, name)
        return self._mirrors[name].folder

    @contextlib.contextmanager
    def folder(self, name: str, *, write: bool = True) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="mora-jax-") as scratch:
            mirror = self._mirror(scratch, name)
            yield mirror.folder
            if write:
                mirror.copy()

    def _mirror(self, scratch: str, name: str) -> Mirror:
        """A folder on the disk whose files `copy` puts into the bucket's folder of this name."""

        def put(file: Path, below: str) -> None:
            def copy() -> None:
                with file.open("rb") as source, (self.path / name / below).open("wb") as target:
                    shutil.copyfileobj(source, target, 2**23)

            self._retry(copy, f"{name}/{below}", "written")

        return Mirror(Path(scratch) / name, put)


class MemoryFiles(Files):
    """Files that are only kept in memory, of a run that writes nothing."""

    remote = True  # nothing local to make

    def __init__(self) -> None:
        super().__init__(Path("(nothing is written)"))
        self._texts: dict[str, str] = {}

    def make(self) -> None:
        pass

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        yield

    def present(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if name in self._texts]

    def read(self, name: str) -> bytes | None:
        return self._texts[name].encode() if name in self._texts else None

    def write(self, name: str, text: str) -> None:
        self._texts[name] = text

    def append(self, name: str, text: str) -> None:
        self._texts[name] = self._texts.get(name, "") + text

    def names(self, folder: str) -> list[str]:
        return []

    def remove(self, name: str) -> None:
        self._texts.pop(name, None)
