"""Files to conversations: reads, finds out the format, and says which row breaks it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mora_jax.data.conversation import Conversation, Rows
from mora_jax.data.formats import Format, detect_format, find_format
from mora_jax.data.reading import read_rows
from mora_jax.errors import InputError


def load_rows(paths: str | Path | Iterable[str | Path], format: str | None = None) -> Rows:
    """Reads data files into conversations.

    Args:
      paths: one file or several; all of one format.
      format: a name in `formats.FORMATS`, or None to find it out from the first row.

    Returns:
      The conversations, with the name of their format.

    Raises:
      InputError: names the file, the row and the key that cannot be used.
    """
    files = (paths,) if isinstance(paths, str | Path) else tuple(paths)
    if not files:
        raise InputError("no data file given")
    chosen = find_format(format) if format else None
    conversations: list[Conversation] = []
    for path in files:
        before = len(conversations)
        for number, row in read_rows(path):
            source = f"{path}, row {number}"
            chosen = chosen or detect_format(row, source)
            conversations.extend(_convert(row, chosen, source, guessed=format is None))
        if len(conversations) == before:
            raise InputError(f"{path} holds no rows")
    assert chosen is not None
    return Rows(conversations, chosen.name, tuple(map(str, files)))


def _convert(row: Any, chosen: Format, source: str, guessed: bool) -> Iterator[Conversation]:
    if not isinstance(row, dict):
        raise InputError(f"{source}: a row should be an object with keys; expected {chosen.wanted}")
    if guessed and not chosen.matches(row):
        _explain(row, chosen, source)
    return chosen.convert(row, source)


def _explain(row: dict[str, Any], chosen: Format, source: str) -> None:
    """Raises if the row is of another format; a row that is of none is left to the format's own checks."""
    try:
        other = detect_format(row, source)
    except InputError:
        return
    raise InputError(
        f"{source}: mixed formats: this row is of format `{other.name}`, the ones before of `{chosen.name}`"
        f" (expected {chosen.wanted}); give each format a file of its own"
    )
