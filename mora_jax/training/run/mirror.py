"""A folder on this machine's disk that is copied into a bucket now and then, for programs that write to disks alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class Mirror:
    """Copies what has changed in a folder.

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
            name, found = str(file.relative_to(self.folder)), file.stat()
            state = found.st_size, found.st_mtime_ns
            if self._copied.get(name) != state:
                self._put(file, name)
                self._copied[name] = state
