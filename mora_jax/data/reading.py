"""Containers: files to numbered rows (dicts). What the keys of a row mean is `formats.py`'s matter.

Parquet goes through `datasets`. JSON and CSV do not: its readers guess types from the values, so that an
answer "2011-01-01" comes back as a datetime and "007" as 7, and their errors know neither row nor key.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mora_jax.errors import InputError

#: A row's number in its file, counted from 1 (lines for files of lines), and its keys and values.
NumberedRow = tuple[int, Any]


def read_rows(path: str | Path) -> Iterator[NumberedRow]:
    """Reads one file, row by row.

    Args:
      path: a .json, .jsonl, .jsonl.gz, .csv, .parquet or .txt file. A .json file may hold lines too.

    Yields:
      `(number, row)`.

    Raises:
      InputError: for a path, an encoding or a syntax that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the data file itself")
    if not path.exists():
        raise InputError(f"no such data file: {path}")
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if packed else suffixes)[-1:]
    reader = _READERS.get(kind[0] if kind else "")
    if reader is None:
        raise InputError(
            f"{path}: cannot tell the kind of file from its name; known endings: {', '.join(_READERS)}, .gz"
        )
    if kind == [".parquet"]:
        if packed:
            raise InputError(f"{path}: a .parquet file is compressed inside; unpack the .gz first")
        yield from _read_parquet(path, b"")
        return
    yield from reader(path, _bytes(path, packed))


def _bytes(path: Path, packed: bool) -> bytes:
    try:
        data = path.read_bytes()
        if packed:
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: broken gzip data ({error})") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise InputError(f"{path} is empty")
    return data


def _decode(data: bytes, path: Path, number: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        number += data.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}, line {number}: not valid UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None


def _parse(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = not text[error.pos :].strip()
        reason = "the file ends in the middle of a value" if cut else error.msg
        raise InputError(
            f"{path}, line {number + error.lineno - 1}, column {error.colno}: broken JSON ({reason})"
        ) from None
    except RecursionError:
        raise InputError(f"{path}, line {number}: JSON nested too deeply to read") from None


def _read_lines(path: Path, data: bytes) -> Iterator[NumberedRow]:
    # Only "\n" ends a line: `str.splitlines` would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield number, _parse(_decode(line, path, number), path, number)


def _read_json(path: Path, data: bytes) -> Iterator[NumberedRow]:
    first_line = data.lstrip().split(b"\n", 1)[0]
    if not first_line.startswith(b"[") and _is_json(first_line):
        yield from _read_lines(path, data)
        return
    rows = _parse(_decode(data, path, 1), path, 1)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of rows, [...], or one row a line")
    if not rows:
        raise InputError(f"{path} holds an empty list")
    yield from enumerate(rows, start=1)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _read_csv(path: Path, data: bytes) -> Iterator[NumberedRow]:
    table = csv.reader(io.StringIO(_decode(data, path, 1), newline=""), strict=True)
    limit = csv.field_size_limit(2**31 - 1)
    try:
        names = next(table)
        for number, fields in enumerate(table, start=1):
            if len(fields) != len(names) and fields:
                raise InputError(
                    f"{path}, row {number}: {len(fields)} fields where the header names {len(names)} columns"
                )
            if fields:
                yield number, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {table.line_num}: broken CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _read_text(path: Path, data: bytes) -> Iterator[NumberedRow]:
    """One row a line, as `datasets` reads text files; blank lines are none."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield number, {"text": _decode(line, path, number).removesuffix("\r")}


def _read_parquet(path: Path, data: bytes) -> Iterator[NumberedRow]:
    del data  # `datasets` opens the file itself, and streams it.
    from datasets import load_dataset

    try:
        yield from enumerate(
            load_dataset("parquet", data_files=str(path), split="train", streaming=True), start=1
        )
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


_READERS: dict[str, Callable[[Path, bytes], Iterator[NumberedRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
