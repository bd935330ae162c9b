"""What Arrow holds: Parquet files, folders that `datasets` saved, and data sets on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from mora_jax.data.read.validate import one_line
from mora_jax.errors import InputError

#: Rows that are turned into Python objects at once.
_BATCH = 1000


def read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a Parquet file, with their numbers from 1."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(_BATCH))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({one_line(error)})") from None


def _numbered(tables: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    # Table by table: several times as fast as row by row.
    rows = (row for table in tables for row in table.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield number, {key: _without_nulls(value) for key, value in row.items()}


def _tables(dataset: Any) -> Iterable[Any]:
    return dataset.with_format("arrow").iter(batch_size=_BATCH)


def _without_nulls(value: Any) -> Any:
    """Leaves out the keys of inner objects that are null: Arrow gives every object all keys that any one has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and not isinstance(value[0], int | float | str):
        return [_without_nulls(item) for item in value]
    return value


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
        return _numbered(_tables(self._dataset))

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

    def _error(self, error: Exception) -> InputError:
        return InputError(
            f"cannot read {self.name}, which is no file or folder here, from the hub: {one_line(error)}; check the"
            " path or id, data.subset, data.split and the network"
        )

    @cached_property
    def _dataset(self) -> Any:
        from datasets import exceptions, load_dataset

        try:
            return load_dataset(self.identity, self.subset, split=self.split, streaming=self.streaming)
        except (ValueError, OSError, ImportError, RuntimeError, exceptions.DatasetsError) as error:
            raise self._error(error) from None

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Numbered rows."""
        from datasets import exceptions

        rows = _numbered(_tables(self._dataset))
        while True:
            try:
                row = next(rows, None)
            except (ValueError, OSError, exceptions.DatasetsError) as error:
                raise self._error(error) from None
            if row is None:
                return
            yield row

    def digest(self) -> str:
        """What `datasets` itself calls this version of the data."""
        if not self.streaming:
            return f"hub {self._dataset._fingerprint}"
        from datasets import exceptions, load_dataset_builder

        try:
            builder = load_dataset_builder(self.identity, self.subset)
        except (ValueError, OSError, ImportError, RuntimeError, exceptions.DatasetsError) as error:
            raise self._error(error) from None
        return f"hub {self.identity} {self.subset} {self.split} {builder.hash}"
