"""Texts of code that are everywhere: the standard library of the Python that runs. They change with its version."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from mora_jax.errors import InputError

PARTS = ("train", "held_out", "test")


def code_texts(characters: int) -> dict[str, list[dict[str, str]]]:
    """Rows of plain text, cut between lines, by part: every tenth file is held out, every tenth other one for the test.

    Args:
        characters: about as many a row.

    Raises:
        InputError: this Python has no standard library in files.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if len(files) < 10:
        raise InputError("this Python has no standard library in files; give --data FILE")
    found: dict[str, list[dict[str, str]]] = {part: [] for part in PARTS}
    for number, file in enumerate(files):
        part = {8: "held_out", 9: "test"}.get(number % 10, "train")
        found[part] += [{"text": text} for text in pieces(file.read_text(encoding="utf-8"), characters)]
    return found


def pieces(text: str, characters: int) -> list[str]:
    """A text in pieces of whole lines, each at least so many characters long but for the last."""
    found, lines = [], list[str]()
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= characters:
            found.append("".join(lines))
            lines = []
    return [*found, "".join(lines)] if "".join(lines).strip() else found
