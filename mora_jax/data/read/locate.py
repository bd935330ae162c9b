"""Where rows are: files, globs, folders, folders that `datasets` saved, data sets on the hub, and memory."""

import contextlib
import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax.data.read.files import BATCH, COMPRESSIONS, READERS, DataFile, known_endings, numbered_rows
from mora_jax.data.read.validate import one_line
from mora_jax.errors import InputError
from mora_jax.paths import expanded, glob_pattern


def _tables(dataset: Any) -> Iterable[Any]:
    return dataset.with_format("arrow").iter(batch_size=BATCH)


class SavedFolder:
    """A folder that `save_to_disk` of `datasets` wrote.

    Args:
      path: the folder.
      split: which of several splits; None: `train`, or the only one. As for a file, it says nothing about a
        folder that was saved without splits.
    """

    def __init__(self, path: Path, split: str | None = None):
        self.path = path
        self.split = split if (path / "dataset_dict.json").is_file() else None

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a folder was written by `save_to_disk`."""
        return (path / "dataset_dict.json").is_file() or (
            (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
        )

    @property
    def name(self) -> str:
        """The path as text, and the split if one is asked for."""
        return f"{self.path} ({self.split})" if self.split else str(self.path)

    @cached_property
    def _dataset(self) -> Any:
        from datasets import DatasetDict, load_from_disk

        try:
            loaded = load_from_disk(str(self.path))
        except (ValueError, OSError, LookupError, AttributeError, TypeError) as error:
            # `datasets` checks nothing in a folder's metadata: a wrong kind of value or no rows fail as they may.
            raise InputError(
                f"{self.path}: not a readable folder of `datasets` with rows in it ({one_line(error)})"
            ) from None
        if isinstance(loaded, DatasetDict):
            splits = list(loaded)
            chosen = self.split or (splits[0] if len(splits) == 1 else "train")
            if chosen not in loaded:
                raise InputError(f"{self.path} has no split {chosen!r}: set data.split to one of {', '.join(splits)}")
            loaded = loaded[chosen]
        return loaded

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Numbered rows; they are mapped into memory as they are read."""
        return numbered_rows(_tables(self._dataset))

    def digest(self) -> str:
        """SHA-256 of the files that the rows are in, and of the types of the columns."""
        total = hashlib.sha256(repr(self._dataset.features).encode())
        for file in self._dataset.cache_files:
            with open(file["filename"], "rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
        return f"saved {total.hexdigest()}"


class HubData:
    """A data set on the hub.

    Args:
      identity: `owner/name`.
      split: None: `train`. Slices such as `train[:1000]` are understood by `datasets`.
      subset: the configuration, where the data set has several.
      streaming: read over the network as rows are asked for, instead of downloading first.
    """

    def __init__(self, identity: str, split: str | None = None, subset: str | None = None, streaming: bool = False):
        self.identity, self.split, self.subset, self.streaming = identity, split or "train", subset, streaming

    @property
    def name(self) -> str:
        """The id, the subset and the split."""
        return f"{self.identity} ({', '.join(filter(None, (self.subset, self.split)))})"

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        from datasets import exceptions

        try:
            yield
        except (ValueError, OSError, ImportError, RuntimeError, exceptions.DatasetsError) as error:
            raise InputError(
                f"cannot read {self.name}, which is no file or folder here, from the hub: {one_line(error)}; check the"
                " path or id, data.subset, data.split and the network"
            ) from None

    @cached_property
    def _dataset(self) -> Any:
        from datasets import load_dataset

        with self._reading():
            return load_dataset(self.identity, self.subset, split=self.split, streaming=self.streaming)

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Numbered rows."""
        tables = _tables(self._dataset)
        with self._reading():
            yield from numbered_rows(tables)

    def digest(self) -> str:
        """What `datasets` itself calls this version of the data."""
        if not self.streaming:
            return f"hub {self._dataset._fingerprint}"
        from datasets import load_dataset_builder

        with self._reading():
            builder = load_dataset_builder(self.identity, self.subset)
        return f"hub {self.identity} {self.subset} {self.split} {builder.hash}"


#: What stands for such rows where a file's path would.
NAME = "rows in memory"


class MemoryRows:
    """Rows in memory, as something to read rows from.

    Args:
      rows: dictionaries, or anything that yields them, such as a `datasets.Dataset`; or a table of pandas.
    """

    name = NAME

    def __init__(self, rows: Any):
        self._rows = rows

    @cached_property
    def _all(self) -> list[Any]:
        is_table = hasattr(self._rows, "to_dict") and hasattr(self._rows, "columns")  # pandas.DataFrame
        return [_without_numpy(row) for row in (self._rows.to_dict("records") if is_table else self._rows)]

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yields (number from 1 on, row)."""
        yield from enumerate(self._all, start=1)

    def digest(self) -> str:
        """Another text if the rows are others."""
        digest = hashlib.sha256()
        for row in self._all:
            # In the order of the keys: templates write a tool's arguments in theirs.
            digest.update(json.dumps(row, default=repr).encode() + b"\n")
        return digest.hexdigest()


def _without_numpy(value: Any) -> Any:
    """A row with plain lists and numbers for numpy's, which pandas has in the cells of a Parquet table."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _without_numpy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_numpy(item) for item in value]
    return value


#: Something that holds rows: `name` is what a user knows it by, `digest()` another text if the rows are others.
Origin = DataFile | SavedFolder | HubData | MemoryRows

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KIND, _PACKED = ("|".join(map(re.escape, endings)) for endings in (READERS, COMPRESSIONS))
_DATA_NAME = re.compile(rf".*({_KIND})({_PACKED})?", re.IGNORECASE | re.DOTALL)


def locate(
    paths: Any,
    split: str | None = None,
    subset: str | None = None,
    streaming: bool = False,
    notes: list[str] | None = None,
) -> tuple[Origin, ...]:
    """Finds what paths mean.

    Args:
      paths: each a file, a folder of files, a folder saved by `datasets`, a glob, or the id of a data set on the
        hub, `owner/name`, that is no path; or rows in memory.
      split: of hub data, of saved folders, and of folders whose files are named after several splits.
      subset: of hub data.
      streaming: of hub data.
      notes: what a user should be told is added to it.

    Raises:
      InputError: for a path that leads nowhere.
    """
    rows = memory_rows(paths)
    if rows is not None:
        return (rows,)
    given = (paths,) if isinstance(paths, str | Path) else tuple(paths)
    if not given or not all(map(str, given)):
        raise InputError("no data file given: name files, a folder, a glob or a data set on the hub")
    told = [] if notes is None else notes
    try:
        return tuple(origin for path in given for origin in _find(str(path), split, subset, streaming, told))
    except NoSuchFile as error:
        if len(given) > 1:
            raise InputError(
                f"{error} (commas separate paths; one with a comma in its name is given by its folder or a glob)"
            ) from None
        raise


class NoSuchFile(InputError):
    """A path that leads nowhere."""


def _find(text: str, split: str | None, subset: str | None, streaming: bool, notes: list[str]) -> list[Origin]:
    path = expanded(text)
    # A file whose name has brackets in it is that file.
    if path.is_dir():
        return [SavedFolder(path, split)] if SavedFolder.is_one(path) else _data_files(path, split or "train", notes)
    if path.exists():
        return [DataFile(path)]
    if glob.has_magic(text):
        # Names are shown to the user as they were given.
        pattern = glob_pattern(text) if text.startswith("~") else text
        names = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
        files: list[Origin] = [DataFile(name) for name in names if name.is_file()]
        if not files:
            hint = "; a name with [ in it is written with [[] in a glob" if "[" in text else ""
            raise InputError(f"no file matches {text}{hint}")
        return files
    # An owner of the name of a folder here is more likely a path that was mistyped.
    if _HUB_ID.fullmatch(text) and not _DATA_NAME.fullmatch(text) and not path.parent.is_dir():
        return [HubData(text, split, subset, streaming)]
    if path.is_symlink():
        raise NoSuchFile(f"no such data file: {text} is a link to {path.readlink()}, which is not there")
    raise NoSuchFile(f"no such data file: {text}" + ("; folders are separated by /" if "\\" in text else ""))


#: Files that lie beside data and hold none, by the beginnings of their names.
_BESIDE = ("readme", "license", "licence", "requirements", "dataset_info", "dataset_dict", "state.json", "citation")
#: What the files of a split are called, by the name of the split.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


def _data_files(folder: Path, split: str, notes: list[str]) -> list[Origin]:
    files = [file for file in sorted(folder.iterdir()) if _is_data(file)]
    if not files:
        raise InputError(f"{folder} is a folder without data files; {_elsewhere(folder)}")
    for file in files:
        if not file.exists():
            raise InputError(f"{file} is a link to {file.readlink()}, which is not there")
    chosen = _of_split(folder, files, split)
    if len(chosen) < len(files):
        others = ", ".join(file.name for file in files if file not in chosen)
        notes.append(f"{folder}: files of other splits than {split} are left out: {others}")
    return [DataFile(file) for file in chosen]


def _is_data(file: Path) -> bool:
    name = file.name.lower()
    known = _DATA_NAME.fullmatch(name) and not name.startswith((".", *_BESIDE))
    return bool(known) and (file.is_file() or (file.is_symlink() and not file.exists()))


def _elsewhere(folder: Path) -> str:
    """Where the data may be, or which endings are known."""
    below = next((file for file in sorted(folder.glob("*/*")) if _is_data(file) and file.exists()), None)
    if below is not None:
        return f"there are some in {below.parent}: name that folder, or a glob such as {folder}/**/*{below.suffix}"
    return f"known endings: {known_endings()}"


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files of one split, with those that are named after none; all of them if there are not several splits."""
    names = {file: _split_of(file, split) for file in files}
    known = {name for name in names.values() if name}
    if len(known) < 2:
        return files
    wanted = next((name for name, spelled in _SPLITS.items() if split in spelled), split)
    if wanted not in known:
        raise InputError(
            f"{folder} has files of the splits {', '.join(sorted(known))}, and none of {split!r}: set data.split and"
            " data.eval_split, or name the files"
        )
    return [file for file in files if names[file] in (wanted, None)]


def _split_of(file: Path, split: str) -> str | None:
    """The split that a file is named after, as its first or last word; None for none."""
    stem = re.sub(r"-\d+-of-\d+", "", file.name.lower()).partition(".")[0]
    if split not in {word for spelled in _SPLITS.values() for word in spelled} and stem.startswith(split.lower()):
        return split  # One of its own, such as train_sft.
    stem_parts = re.split(r"[-_ ]+", stem)
    ends = (stem_parts[0], stem_parts[-1])
    return next((name for name, spelled in _SPLITS.items() if not {*spelled}.isdisjoint(ends)), None)


def memory_rows(given: Any) -> MemoryRows | None:
    """`given` as rows in memory; None where it is a path or paths.

    Raises:
      InputError: it is neither rows nor paths.
    """
    if given is None or isinstance(given, str | Path | MemoryRows):
        return given if isinstance(given, MemoryRows) else None
    if isinstance(given, Mapping):
        splits = hasattr(given, "column_names")  # a datasets.DatasetDict
        hint = f"take a split, {', '.join(map(repr, given))}" if splits else "put it into a list"
        raise InputError(f"rows should be a list of dictionaries and are one dictionary: {hint}")
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        return MemoryRows(given)
    if not isinstance(given, Iterable):
        raise InputError(f"rows should be dictionaries or paths, not {type(given).__name__}")
    if isinstance(given, Iterator):
        given = list(given)
    first = next(iter(given), None)
    return MemoryRows(given) if isinstance(first, Mapping) else None
