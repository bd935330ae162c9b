"""Files to rows of one kind: reads, finds out the format, and says which row breaks it."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

from mora_jax.data.conversation import Row
from mora_jax.data.formats.column_mapping import NO_MAPPING, Mapping
from mora_jax.data.formats.messages import CHATS, has_plain_turns
from mora_jax.data.formats.registry import FORMATS, Format, detect_format, find_format, recognise
from mora_jax.data.read.locate import Origin, locate
from mora_jax.data.read.validate import check_weight, found
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


class Rows(list[Row]):
    """The rows of one or more files, in the order of the files.

    Attributes:
      format: the name of the format they were read as; empty if they come from no file.
      files: the paths.
      skipped: the rows that could not be used, where such rows are skipped.
    """

    def __init__(
        self, rows: Iterable[Row], format: str = "", files: tuple[str, ...] = (), skipped: Skipped | None = None
    ):
        super().__init__(rows)
        self.format, self.files, self.skipped = format, files, skipped or Skipped()

    def __str__(self) -> str:
        origin = ", ".join(self.files) or "memory"
        skipped = f"; {self.skipped}" if self.skipped.count else ""
        return f"{len(self)} rows of format `{self.format or 'none'}` from {origin}{skipped}"


#: Rows in which a format is looked for.
_LOOK_AT = 20
ON_ERROR = ("raise", "skip")


@dataclass(frozen=True)
class Converter:
    """Turns a row as a file holds it into rows; it can be sent to another process.

    Attributes:
      format: the name of the format.
      guessed: whether the format was recognised rather than asked for; a row of another one is then an error.
      mapping: other names for columns and roles.
      plain_turns: what `has_plain_turns` says of the first row; a row of which it says something else is an error.
    """

    format: str
    guessed: bool = False
    mapping: Mapping = NO_MAPPING
    plain_turns: bool | None = None

    def __call__(self, source: str, raw: Any) -> list[Row]:
        """Converts a row.

        Args:
          source: file and row, for errors.
          raw: the row as it was read. An error in its place is raised.

        Returns:
          Nearly always one row; one for each instance of self_instruct.

        Raises:
          InputError: says what in the row cannot be used.
        """
        if isinstance(raw, InputError):
            raise raw
        try:
            return self._convert(source, self.mapping.apply(raw))
        except InputError as error:
            raise self.mapping.explain(error) from None

    def _convert(self, source: str, row: Any) -> list[Row]:
        chosen = FORMATS[self.format]
        if not isinstance(row, dict):
            raise InputError(
                f"{source}: a row should be an object with keys and is {found(row)}; expected {chosen.wanted}"
            )
        broken = not row.keys().isdisjoint(chosen.marks)
        if self.guessed and not broken and not chosen.matches(row) and (other := recognise(row)):
            raise InputError(
                f"{source}: mixed formats: this row is of format `{other.name}`, others are of `{chosen.name}`"
                f" (expected {chosen.wanted}); give each format a file of its own"
            )
        plain = has_plain_turns(row)
        if None not in (plain, self.plain_turns) and plain != self.plain_turns:
            key = next(key for key in CHATS if row.get(key))
            kinds = "plain texts, others are of objects" if plain else "objects, others are of plain texts"
            raise InputError(f"{source}: `{key}` is a list of {kinds}; give each kind a file of its own")
        rows = list(chosen.convert(row, source, self.mapping))
        weight = row.get("weight")
        # An empty cell of a CSV table says nothing.
        if weight is None or weight == "":
            return rows
        factor = check_weight(weight, "weight", source)
        return [replace(item, weight=factor) for item in rows]


@dataclass(eq=False)
class RowStream(Iterable[Row]):
    """The rows of one or more files, read again, one at a time, at each iteration. Made by `open_rows`.

    Attributes:
      origins: what the rows come from.
      asked: the format that was asked for; None: it is found out.
      mapping, on_error, max_rows: see `open_rows`.
      notes: what a user should be told about the files.
      skipped: what was left out of the last pass, with `on_error="skip"`.
    """

    origins: tuple[Origin, ...]
    asked: Format | None
    mapping: Mapping
    on_error: str
    max_rows: int | None
    notes: tuple[str, ...] = ()
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def files(self) -> tuple[str, ...]:
        """The paths and ids that the rows come from."""
        return tuple(origin.name for origin in self.origins)

    @property
    def format(self) -> str:
        """The name of the format. If none was asked for, the first rows are looked at."""
        return self.converter.format

    @cached_property
    def converter(self) -> Converter:
        """What turns the rows of `raw` into rows; it can be sent to other processes."""
        seen = self._first_rows()
        plain = next((plain for _, row in seen if (plain := has_plain_turns(row)) is not None), None)
        if self.asked:
            return Converter(self.asked.name, False, self.mapping, plain)
        try:
            return Converter(detect_format(seen).name, True, self.mapping, plain)
        except InputError as error:
            raise self.mapping.explain(error) from None

    def _first_rows(self) -> list[tuple[str, Any]]:
        """Rows under our names with their sources, up to the first of which a format is recognised."""
        seen: list[tuple[str, Any]] = []
        skipped = Skipped()
        try:
            for source, raw in self.raw():
                if isinstance(raw, InputError):
                    skipped.add(raw)
                    continue
                seen.append((source, self.mapping.apply(raw)))
                if len(seen) == _LOOK_AT or recognise(seen[-1][1]):
                    break
        except InputError:
            if not seen:
                raise
        if not seen:
            raise _nothing_left(skipped)
        return seen

    def raw(self) -> Iterator[tuple[str, Any]]:
        """Reads the rows as they are, for `converter` to convert, here or in another process.

        Yields:
          `(source, row)`: file and number of the row, and its keys and values. With `on_error="skip"` the error
          comes in place of a row that cannot be read; `converter` raises it.

        Raises:
          InputError: for what cannot be read.
        """
        return islice(self._read(), self.max_rows)

    def _read(self) -> Iterator[tuple[str, Any]]:
        for origin in self.origins:
            empty = True
            for number, row in origin.rows():
                empty = False
                if self.on_error == "raise" and isinstance(row, InputError):
                    raise or_skip(row)
                yield f"{origin.name}, row {number}", row
            if empty:
                raise InputError(f"{origin.name} holds no rows")

    def __iter__(self) -> Iterator[Row]:
        convert = self.converter
        skipped = self.skipped = Skipped()
        count = 0
        for source, raw in self.raw():
            try:
                rows = convert(source, raw)
            except InputError as error:
                if self.on_error == "raise":
                    raise or_skip(error) from None
                skipped.add(error)
                continue
            count += len(rows)
            yield from rows
        if not count:
            raise _nothing_left(skipped)

    def fingerprint(self) -> str:
        """SHA-256 of the data and of all settings that change what rows are made of it."""
        settings = {
            "format": self.asked.name if self.asked else None,
            "columns": self.mapping.columns,
            "roles": self.mapping.roles,
            "on_error": self.on_error,
            "max_rows": self.max_rows,
            "data": [origin.digest() for origin in self.origins],
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        return f"rows of format `{self.format}` from {', '.join(self.files)}"


def _nothing_left(skipped: Skipped) -> InputError:
    return InputError(f"no row can be used: {skipped}")


def open_rows(
    paths: Any,
    format: str | None = None,
    *,
    mapping: Mapping | None = None,
    on_error: str = "raise",
    split: str | None = None,
    subset: str | None = None,
    streaming: bool = False,
    max_rows: int | None = None,
) -> RowStream:
    """Finds data; its rows are read when they are asked for, and memory holds one of them at a time.

    Args:
      paths: one or several: data files, globs, folders of data files, folders saved by `datasets`, or hub ids
        (`owner/name`); all of one format. Or rows in memory: dictionaries, a `datasets.Dataset`, a table of pandas.
      format: a name in `FORMATS`, or None to find it out from the first rows.
      mapping: the data's names of columns and roles.
      on_error: `raise` at the first row that breaks the format, or `skip` such rows and count them. What cannot be
        read at all is an error in either case, and so is data of which every row is skipped.
      split: of hub data (default `train`), of saved folders with several splits, and of folders whose files are
        named after several.
      subset: of hub data.
      streaming: read hub data over the network as it is needed.
      max_rows: read so many rows and no more.

    Raises:
      InputError: for paths that lead nowhere and settings that do not exist.
    """
    if on_error not in ON_ERROR:
        raise InputError(f"unknown on_error {on_error!r}: choose one of {', '.join(ON_ERROR)}")
    if max_rows is not None and max_rows < 1:
        raise InputError(f"max_rows is {max_rows}: it must be at least 1")
    chosen = find_format(format) if format else None
    notes: list[str] = []
    origins = locate(paths, split, subset, streaming, notes)
    return RowStream(origins, chosen, mapping or NO_MAPPING, on_error, max_rows, tuple(notes))


def load_rows(paths: Any, format: str | None = None, **settings: Any) -> Rows:
    """Reads data into memory.

    Args:
      paths: as for `open_rows`.
      format: as for `open_rows`.
      **settings: the others of `open_rows`.

    Returns:
      The rows, with the name of their format and what was skipped.

    Raises:
      InputError: names the file, the row and the key that cannot be used.
    """
    stream = open_rows(paths, format, **settings)
    rows = list(stream)
    return Rows(rows, stream.format, stream.files, stream.skipped)
