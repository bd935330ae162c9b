"""Where rows are: files, globs, folders, folders that `datasets` saved, and data sets on the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from mora_jax.data.arrow_rows import HubData, SavedFolder
from mora_jax.data.reading import READERS, DataFile, NumberedRow
from mora_jax.errors import InputError
from mora_jax.paths import expanded, glob_pattern

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_NAME = re.compile(rf".*({'|'.join(map(re.escape, READERS))})(\.gz)?", re.IGNORECASE | re.DOTALL)


class Origin(Protocol):
    """Something that holds rows."""

    @property
    def name(self) -> str:
        """What a user knows it by; errors begin with it."""

    def rows(self) -> Iterator[NumberedRow]:
        """Reads it from the beginning."""

    def digest(self) -> str:
        """Another text if the rows are others."""


def locate(
    paths: str | Path | Iterable[str | Path],
    split: str | None = None,
    subset: str | None = None,
    streaming: bool = False,
) -> tuple[Origin, ...]:
    """Finds what paths mean.

    Args:
      paths: each a file, a folder of files, a folder saved by `datasets`, a glob, or the id of a data set on the
        hub, `owner/name`, that is no path.
      split: of hub data and saved folders.
      subset: of hub data.
      streaming: of hub data.

    Raises:
      InputError: for a path that leads nowhere.
    """
    given = (paths,) if isinstance(paths, str | Path) else tuple(paths)
    if not given or not all(map(str, given)):
        raise InputError("no data file given: name files, a folder, a glob or a data set on the hub")
    return tuple(origin for path in given for origin in _find(str(path), split, subset, streaming))


def _find(text: str, split: str | None, subset: str | None, streaming: bool) -> list[Origin]:
    path = expanded(text)
    # A file whose name has brackets in it is that file.
    if path.is_dir():
        return [SavedFolder(path, split)] if SavedFolder.is_one(path) else _data_files(path)
    if path.exists():
        return [DataFile(path)]
    if glob.has_magic(text):
        found = sorted(Path(name) for name in glob.glob(_pattern(text), recursive=True))
        files: list[Origin] = [DataFile(name) for name in found if name.is_file()]
        if not files:
            raise InputError(f"no file matches {text}")
        return files
    # An owner of the name of a folder here is more likely a path that was mistyped.
    if _HUB_ID.fullmatch(text) and not _DATA_NAME.fullmatch(text) and not path.parent.is_dir():
        return [HubData(text, split, subset, streaming)]
    raise InputError(f"no such data file: {text}")


def _pattern(text: str) -> str:
    """What `glob` is asked for: names are shown to the user as they were given."""
    return glob_pattern(text) if text.startswith("~") else text


def _data_files(folder: Path) -> list[Origin]:
    files: list[Origin] = [
        DataFile(file)
        for file in sorted(folder.iterdir())
        if file.is_file() and _DATA_NAME.fullmatch(file.name) and not file.name.startswith(".")
    ]
    if not files:
        raise InputError(
            f"{folder} is a folder without data files; known endings: {', '.join(READERS)}, .gz. Files in folders"
            f" below are found by a glob, such as {folder}/**/*.jsonl"
        )
    return files
