"""Rows that a program has in memory: a list of dictionaries, a `datasets.Dataset`, a table of pandas."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax.errors import InputError

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


def memory_rows(given: Any) -> MemoryRows | None:
    """`given` as rows in memory; None where it is a path or paths.

    Raises:
      InputError: it is neither rows nor paths.
    """
    if given is None or isinstance(given, str | Path | MemoryRows):
        return given if isinstance(given, MemoryRows) else None
    if isinstance(given, Mapping):
        raise InputError("rows should be a list of dictionaries and are one dictionary: put it into a list")
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        return MemoryRows(given)
    if not isinstance(given, Iterable):
        raise InputError(f"rows should be dictionaries or paths, not {type(given).__name__}")
    if isinstance(given, Iterator):
        given = list(given)
    first = next(iter(given), None)
    return MemoryRows(given) if isinstance(first, Mapping) else None
