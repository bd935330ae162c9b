"""Data files to numbered rows (dicts), one row at a time. What the keys of a row mean is `registry.py`'s matter.

Parquet goes through Arrow. JSON and CSV do not: its readers guess types from the values, so that an answer
"2011-01-01" comes back as a datetime and "007" as 7, and their errors know neither row nor key.

A JSON list is read element by element: only the current element and one piece of the file are in memory.
"""

import codecs
import contextlib
import csv
import functools
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from mora_jax.data.read.validate import one_line
from mora_jax.errors import InputError

_PIECE = 1 << 18
# No token of JSON that is not a text is longer. What fails this close to the end of what was read may be whole
# once more is read.
_MARGIN = 16
_SPACE = re.compile(r"[ \t\n\r]*")
_UNFINISHED = "Unterminated string"


def once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """An object's keys and values; the last of two would win without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} stands twice in one object; keep one")
    return values


def parse(text: str, path: Path, number: int) -> Any:
    """The value of a line of that number."""
    text = text.rstrip()  # what is cut short ends on this line, not behind its end
    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith(_UNFINISHED) or not text[error.pos :].strip()
        reason = "the line ends in the middle of a value" if cut else error.msg
        if error.msg == "Extra data" and text[error.pos :].strip() == ",":
            reason = "a comma after the row; lines have none between them"
        raise InputError(
            f"{path}, line {number + error.lineno - 1}, column {error.colno}: broken JSON ({reason})"
        ) from None
    except (RecursionError, ValueError) as error:
        raise _unreadable(error, path, number) from None


def _unreadable(error: RecursionError | ValueError, path: Path, number: int) -> InputError:
    if isinstance(error, RecursionError):
        return InputError(f"{path}, line {number}: JSON nested too deeply to read")
    # A whole number of thousands of digits, or a key that stands twice.
    return InputError(f"{path}, line {number}: JSON that cannot be read ({error})")


class ListReader:
    """Reads the elements of one list.

    The decoder of the standard library runs on what was read so far; where that ends within an element, at least
    as much again is read before the next try, so that the time grows in step with the size of an element.

    Args:
      read: gives the next text of about so many characters, empty at the end.
      path: for errors.
      piece: how much to read at once.
    """

    def __init__(self, read: Callable[[int], str], path: Path, piece: int = _PIECE):
        self._read, self._path, self._piece = read, path, piece
        self._decoder = json.JSONDecoder(object_pairs_hook=once)
        self._text, self._at, self._ended = "", 0, False
        # The line, and the characters of it, before the current text.
        self._line, self._before = 1, 0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yields `(number, element)`, counted from 1."""
        if self._next_character() != "[":
            self._fail("Expecting '['", self._at)
        self._at += 1
        number = 0
        if self._next_character() != "]":
            while True:
                number += 1
                yield number, self._element()
                character = self._next_character()
                if character not in (",", "]"):
                    self._fail("Expecting ',' delimiter", self._at)
                if character == "]":
                    break
                self._at += 1
                if self._next_character() == "]":
                    self._fail("a comma after the last element", self._at)
        self._at += 1
        if self._next_character():
            self._fail("Extra data", self._at)

    def _more(self) -> None:
        """Drops what is done with, and reads at least as much as is left of the element."""
        text, at = self._text, self._at
        lines = text.count("\n", 0, at)
        self._before = at - text.rfind("\n", 0, at) - 1 if lines else self._before + at
        self._line += lines
        piece = self._read(max(self._piece, len(text) - at))
        self._text, self._at, self._ended = text[at:] + piece, 0, not piece

    def _next_character(self) -> str:
        """Skips space; the character that follows, empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # It matches anywhere.
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def _element(self) -> Any:
        while True:
            size = len(self._text)
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                near = error.pos >= size - _MARGIN or error.msg.startswith(_UNFINISHED)
                if self._ended or not near:
                    self._fail(error.msg, error.pos)
            except (RecursionError, ValueError) as error:
                raise _unreadable(error, self._path, self._line_at(self._at)) from None
            else:
                # The digits of a number may go on.
                if isinstance(value, dict | list | str) or self._ended or end < size - _MARGIN:
                    self._at = end
                    return value
            self._more()

    def _line_at(self, position: int) -> int:
        return self._line + self._text.count("\n", 0, position)

    def _fail(self, reason: str, position: int) -> None:
        start = self._text.rfind("\n", 0, position)
        column = position - start if start >= 0 else self._before + position + 1
        if reason.startswith(_UNFINISHED) or not self._text[position:].strip():
            reason = "the file ends in the middle of a value"
        raise InputError(
            f"{self._path}, line {self._line_at(position)}, column {column}: broken JSON ({reason})"
        ) from None


_BUFFER = 1 << 18
#: How a file is compressed, by the last ending of its name.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file behind its BOM. What goes wrong while it is read is raised as `InputError`."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "rb"))
            if compression:
                # A reader of its own: pyarrow's stream has no lines.
                file = io.BufferedReader(stack.enter_context(pa.CompressedInputStream(file, compression)), _BUFFER)
            if file.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
                file.read(len(codecs.BOM_UTF8))
            yield file
    except OSError as error:
        if compression and error.errno is None:
            raise InputError(f"{path}: broken {compression} data ({error}); get or pack the file again") from None
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def read_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1.

    Only a line feed ends a line: `str.splitlines` would also cut at U+2028, which JSON texts may hold.
    """
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            yield number, line


def decode(data: bytes, path: Path, number: int) -> str:
    """The text of bytes that begin in a line of that number."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, path, number) from None


def not_utf8(error: UnicodeDecodeError, path: Path, number: int) -> InputError:
    """What to tell the user; the bytes that were decoded begin in line `number`."""
    number += error.object.count(b"\n", 0, error.start)
    byte = error.object[error.start]
    return InputError(f"{path}, line {number}: not valid UTF-8 (byte 0x{byte:02x}); save the file as UTF-8")


class TextReader:
    """Reads a file as text, piece by piece.

    Args:
      file: as `open_bytes` gives it.
      path: for errors.
    """

    def __init__(self, file: IO[bytes], path: Path):
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line = 1

    def read(self, size: int) -> str:
        """The text of the next `size` bytes; it may lack a character at the end. Empty at the end of the file."""
        while True:
            data = self._file.read(size)
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise not_utf8(error, self._path, self._line) from None
            self._line += data.count(b"\n")
            if text or not data:
                return text


#: A row's number in its file, counted from 1 (lines for files of lines), and its keys and values. A row that
#: cannot be read, where the next one can, comes as the error.
NumberedRow = tuple[int, Any]


@dataclass(frozen=True)
class DataFile:
    """One file.

    Attributes:
      path: a .json, .jsonl, .ndjson, .csv or .txt file, or one of these in .gz or .zst, or a .parquet file. The
        three kinds of JSON may each hold a list, or a row a line.

    Raises:
      InputError: if the ending of the name is none of these.
    """

    path: Path

    def __post_init__(self) -> None:
        kind, packed = self._kind
        if kind not in READERS:
            raise InputError(
                f"{self.path}: cannot tell the kind of file from its name; known endings: {known_endings()}"
            )
        if kind == ".parquet" and packed:
            raise InputError(f"{self.path}: a .parquet file is compressed inside; unpack it first")

    @property
    def name(self) -> str:
        """The path as text."""
        return str(self.path)

    @property
    def _kind(self) -> tuple[str, bool]:
        before, last = ["", "", *(suffix.lower() for suffix in self.path.suffixes)][-2:]
        return (before, True) if last in COMPRESSIONS else (last, False)

    def rows(self) -> Iterator[NumberedRow]:
        """Reads the file, row by row.

        Raises:
          InputError: for a file, an encoding or a syntax that cannot be read.
        """
        return READERS[self._kind[0]](self.path)

    def digest(self) -> str:
        """SHA-256 of how the file is read, and of its bytes."""
        try:
            with open(self.path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from None
        return f"{self._kind} {content}"


def known_endings() -> str:
    """The endings of names that are read, in words."""
    return ", ".join((*READERS, *COMPRESSIONS))


def _text(line: str, path: Path, number: int) -> dict[str, str]:
    return {"text": line.removesuffix("\n").removesuffix("\r")}


def _lines(file: IO[bytes], path: Path, row_of: Callable[[str, Path, int], Any]) -> Iterator[NumberedRow]:
    """One row a line, as `datasets` reads text files too; blank lines are none."""
    for number, line in read_lines(file):
        try:
            row = row_of(decode(line, path, number), path, number)
        except InputError as error:
            row = error
        yield number, row


def _read_json(path: Path, lines: bool = True) -> Iterator[NumberedRow]:
    """The rows of a list, or one a line; where `lines` aren't what the file's name says, the first must be good."""
    first = _first_byte(path)
    with open_bytes(path) as file:
        if first == b"[":
            rows: Iterator[NumberedRow] = iter(ListReader(TextReader(file, path).read, path))
        else:
            rows = _lines(file, path, parse)
        row = next(rows, None)
        if row is None:
            raise InputError(f"{path} holds an empty list" if first else f"{path} is empty")
        if isinstance(row[1], InputError) and not lines:
            if first != b"{":
                raise row[1]
            raise InputError(
                f"{path}: expected a list of rows, [...], or one row a line; of an object that holds the rows, write"
                f" their list alone ({row[1]})"
            )
        yield row
        yield from rows


def _first_byte(path: Path) -> bytes:
    """The first byte that is no space; empty if there is none."""
    with open_bytes(path) as file:
        while piece := file.read(1 << 16):
            if first := piece.lstrip()[:1]:
                return first
    return b""


def _read_text(path: Path) -> Iterator[NumberedRow]:
    with open_bytes(path) as file:
        number = 0
        for number, row in _lines(file, path, _text):
            yield number, row
        if not number:
            raise InputError(f"{path} is empty")


def _read_csv(path: Path) -> Iterator[NumberedRow]:
    with open_bytes(path) as file:
        texts = (decode(line, path, number) for number, line in enumerate(file, start=1))
        # A carriage return alone ends a line too, as old programs write it; csv.reader wants each line by itself.
        lines = (line for text in texts for line in re.findall(r"[^\r]*\r\n?|[^\r]+", text))
        table = csv.reader(lines, strict=True)
        rows = iter(functools.partial(_next_fields, table, path), None)
        names = next((fields for fields in rows if any(name.strip() for name in fields)), None)
        if names is None:
            raise InputError(f"{path} is empty")
        names = [name.strip() for name in names]
        if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
            raise InputError(f"{path}: the header has no comma but {mark!r}; save the table with commas between cells")
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{path}: the header names the column {twice[0]!r} twice; rename one")
        for number, fields in enumerate(rows, start=1):
            if not fields:
                continue
            row: Any = dict(zip(names, fields, strict=False))
            if len(fields) != len(names):
                count = f"{len(fields)} fields where the header names {len(names)} columns"
                row = InputError(f"{path}, row {number}: {count}")
            yield number, row


def _next_fields(table: Any, path: Path) -> list[str] | None:
    # The limit on a field, 128 KiB, belongs to the whole process; it is put back before anyone else reads.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        return next(table, None)
    except csv.Error as error:
        raise InputError(f"{path}, line {table.line_num}: broken CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


#: Rows that are turned into Python objects at once.
BATCH = 1000


def read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a Parquet file, with their numbers from 1."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from numbered_rows(file.iter_batches(BATCH))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({one_line(error)})") from None


def numbered_rows(tables: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The rows of Arrow tables, with their numbers from 1."""
    # Table by table: several times as fast as row by row.
    rows = (row for table in tables for row in table.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield number, {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """Leaves out the keys of inner objects that are null: Arrow gives every object all keys that any one has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and not isinstance(value[0], int | float | str):
        return [_without_nulls(item) for item in value]
    return value


#: How to read a file, by the ending of its name.
READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".json": functools.partial(_read_json, lines=False),
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".parquet": read_parquet,
}
