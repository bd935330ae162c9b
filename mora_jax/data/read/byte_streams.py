"""Bytes and lines of a file, read as they are needed; plain or compressed, with or without a BOM."""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

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
