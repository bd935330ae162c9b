"""Data files to numbered rows (dicts), one row at a time. What the keys of a row mean is `registry.py`'s matter.

Parquet goes through Arrow. JSON and CSV do not: its readers guess types from the values, so that an answer
"2011-01-01" comes back as a datetime and "007" as 7, and their errors know neither row nor key.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from mora_jax.data.read.hf_datasets import read_parquet
from mora_jax.data.read.json_stream import ListReader, parse
from mora_jax.errors import InputError

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


def _json_or_error(line: bytes, path: Path, number: int) -> Any:
    try:
        return parse(decode(line, path, number), path, number)
    except InputError as error:
        return error


def _text_or_error(line: bytes, path: Path, number: int) -> Any:
    try:
        return {"text": decode(line, path, number).removesuffix("\n").removesuffix("\r")}
    except InputError as error:
        return error


def _read_json_lines(path: Path) -> Iterator[NumberedRow]:
    if _first_byte(path) == b"[":
        yield from _read_json(path)
        return
    with open_bytes(path) as file:
        yield from _rows_of_lines(file, path)


def _rows_of_lines(file: IO[bytes], path: Path) -> Iterator[NumberedRow]:
    number = 0
    for number, line in read_lines(file):
        yield number, _json_or_error(line, path, number)
    if not number:
        raise InputError(f"{path} is empty")


def _read_json(path: Path) -> Iterator[NumberedRow]:
    first = _first_byte(path)
    if not first:
        raise InputError(f"{path} is empty")
    with open_bytes(path) as file:
        if first == b"[":
            rows: Iterator[NumberedRow] = iter(ListReader(TextReader(file, path).read, path))
            empty = f"{path} holds an empty list"
        else:
            rows = _rows_of_lines(file, path)
            empty = f"{path} is empty"
        row = next(rows, None)
        if row is None:
            raise InputError(empty)
        if first == b"{" and isinstance(row[1], InputError):
            raise InputError(
                f"{path}: expected a list of rows, [...], or one row a line; of an object that holds the rows, write"
                f" their list alone ({row[1]})"
            )
        if isinstance(row[1], InputError):
            raise row[1]
        yield row
        yield from rows


def _first_byte(path: Path) -> bytes:
    """The first byte that is no space; empty if there is none."""
    with open_bytes(path) as file:
        while piece := file.read(1 << 16):
            if first := piece.lstrip()[:1]:
                return first
    return b""


def _read_csv(path: Path) -> Iterator[NumberedRow]:
    with open_bytes(path) as file:
        texts = (decode(line, path, number) for number, line in enumerate(file, start=1))
        table = csv.reader(texts, strict=True)
        names: list[str] | None = []
        while names is not None and not any(name.strip() for name in names):
            names = _next_fields(table, path)
        if names is None:
            raise InputError(f"{path} is empty")
        names = [name.strip() for name in names]
        if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
            raise InputError(f"{path}: the header has no comma but {mark!r}; save the table with commas between cells")
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{path}: the header names the column {twice[0]!r} twice; rename one")
        number = 0
        while (fields := _next_fields(table, path)) is not None:
            number += 1
            if not fields:
                continue
            if len(fields) == len(names):
                yield number, dict(zip(names, fields, strict=True))
            else:
                yield (
                    number,
                    InputError(
                        f"{path}, row {number}: {len(fields)} fields where the header names {len(names)} columns"
                    ),
                )


def _next_fields(table: Any, path: Path) -> list[str] | None:
    # The limit on a field, 128 KiB, belongs to the whole process; it is put back before anyone else reads.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        return next(table, None)
    except csv.Error as error:
        raise InputError(f"{path}, line {table.line_num}: broken CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _read_text(path: Path) -> Iterator[NumberedRow]:
    """One row a line, as `datasets` reads text files; blank lines are none."""
    number = 0
    with open_bytes(path) as file:
        for number, line in read_lines(file):
            yield number, _text_or_error(line, path, number)
    if not number:
        raise InputError(f"{path} is empty")


#: How to read a file, by the ending of its name.
READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".parquet": read_parquet,
}
