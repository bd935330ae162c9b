"""Rows in memory, with where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from mora_jax.data.conversation import Row
from mora_jax.errors import InputError


def or_skip(error: InputError) -> InputError:
    """The error of a row that ends a command, with what leaves such rows out instead."""
    return InputError(f"{error} (data.on_error=skip leaves such rows out)")


@dataclass
class Skipped:
    """Rows that broke the format and were left out.

    Attributes:
      count: how many.
      reasons: what was wrong with the first few.
    """

    count: int = 0
    reasons: list[str] = field(default_factory=list)

    #: Reasons that are kept.
    LIMIT = 5

    def add(self, error: Exception) -> None:
        """Counts one."""
        self.count += 1
        if len(self.reasons) < self.LIMIT:
            self.reasons.append(str(error))

    def __str__(self) -> str:
        if not self.count:
            return "no rows skipped"
        return f"{self.count} row{'s' * (self.count > 1)} skipped, the first because of: {self.reasons[0]}"


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The rows of one or more files: a sequence of them.

    Attributes:
      rows: in the order of the files.
      format: the name of the format they were read as; empty if they come from no file.
      files: the paths.
      skipped: the rows that could not be used, where such rows are skipped.
    """

    rows: list[Row]
    format: str = ""
    files: tuple[str, ...] = ()
    skipped: Skipped = field(default_factory=Skipped)

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
        skipped = f"; {self.skipped}" if self.skipped.count else ""
        return f"{len(self)} rows of format `{self.format or 'none'}` from {origin}{skipped}"
