"""Module paths in few words, for reports and messages."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 80
SHOWN = 8


def summary(paths: Iterable[str], shown: int = SHOWN) -> str:
    """Module paths in few words: stacks of layers once, with `*` for their numbers, by the ends that tell them apart.

    Examples:
        >>> summary(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.head"])
        'up_proj, head'
        >>> summary(["blocks.0", "blocks.1", "out", "heads.0.out"])
        'blocks.*, out, heads.*.out'
    """
    starred = list(dict.fromkeys(star(path) for path in paths))
    ends = [_end(path) for path in starred]
    found = [end if ends.count(end) == 1 else path for path, end in zip(starred, ends, strict=True)]
    if len(found) <= shown + 1:
        return ", ".join(found)
    return f"{', '.join(found[:shown])} and {len(found) - shown} more"


def star(path: str) -> str:
    """A path with `*` in place of numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _end(path: str) -> str:
    """The last component that is a name, and what follows it."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part != "*"), default=0)
    return ".".join(parts[last:])


def nearest(name: str, paths: Iterable[str]) -> str:
    """`; did you mean 'q_proj'?` where the end of a path is almost `name`, else nothing."""
    ends = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    close = difflib.get_close_matches(name, ends, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def quoted(value: object, most: int = 60) -> str:
    """`repr` of what a user gave, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's rows as lines: the first column to the left, the others, which are numbers, to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(n) for cell, n in zip(row[1:], others, strict=True))]).rstrip()
        for row in rows
    ]


def wrapped(text: str) -> list[str]:
    """A sentence as lines of a terminal's width."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
