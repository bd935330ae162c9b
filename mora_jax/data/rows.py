"""Rows in memory, with where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from mora_jax.data.conversation import Row


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The rows of one or more files: a sequence of them.

    Attributes:
      rows: in the order of the files.
      format: the name of the format they were read as; empty if they come from no file.
      files: the paths.
    """

    rows: list[Row]
    format: str = ""
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self.rows[index]

    def __str__(self) -> str:
        origin = ", ".join(self.files) or "memory"
        return f"{len(self)} rows of format `{self.format or 'none'}` from {origin}"
