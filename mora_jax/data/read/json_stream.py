"""A JSON list, element by element: only the current element and one piece of the file are in memory."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mora_jax.errors import InputError

_PIECE = 1 << 18
# No token of JSON that is not a text is longer. What fails this close to the end of what was read may be whole
# once more is read.
_MARGIN = 16
_SPACE = re.compile(r"[ \t\n\r]*")
_UNFINISHED = "Unterminated string"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values; the last of two would win without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} stands twice in one object")
    return values


def parse(text: str, path: Path, number: int) -> Any:
    """The value of a line of that number."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith(_UNFINISHED) or not text[error.pos :].strip()
        reason = "the line ends in the middle of a value" if cut else error.msg
        if error.msg == "Extra data" and text[error.pos :].strip() == ",":
            reason = "a comma after the row; lines have none between them"
        raise InputError(
            f"{path}, line {number + error.lineno - 1}, column {error.colno}: broken JSON ({reason})"
        ) from None
    except RecursionError:
        raise InputError(f"{path}, line {number}: JSON nested too deeply to read") from None
    except ValueError as error:  # A whole number of thousands of digits, or a key that stands twice.
        raise InputError(f"{path}, line {number}: JSON that cannot be read ({error})") from None


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
        self._decoder = json.JSONDecoder(object_pairs_hook=_once)
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
            except RecursionError:
                raise InputError(f"{self._path}, line {self._line_at(self._at)}: JSON nested too deeply") from None
            except ValueError as error:  # A whole number of thousands of digits, or a key that stands twice.
                line = self._line_at(self._at)
                raise InputError(f"{self._path}, line {line}: JSON that cannot be read ({error})") from None
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
