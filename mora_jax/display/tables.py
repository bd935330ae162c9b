"""Tables for people, laid out by rich: as wide as the terminal, or as plain text where there is none."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

#: Columns of a report where there is no terminal to ask.
WIDTH = 110
# Columns where a line may be as long as it has to.
_UNLIMITED = 100_000
_GAP = 2


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)) -> Table:
    """A table without rules.

    Args:
        heads: a name a column.
        rows: a text a column.
        words: the columns that hold words, set to the left; the others hold numbers, which are never broken.
    """
    laid_out = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for column, head in enumerate(heads):
        if column in words:
            laid_out.add_column(Text(head), overflow="fold")
        else:
            laid_out.add_column(Text(head), justify="right", no_wrap=True)
    for row in rows:
        laid_out.add_row(*map(Text, row))
    return laid_out


def fitted(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[Table]:
    """A table as one or several, each at most `width` wide: all have the first column, and each some of the others.

    Only a text that alone is wider than there is room for is broken over lines. `width` None: one table.
    """
    if width is None:
        return [table(heads, rows)]
    widths = [max(map(cell_len, column)) for column in zip(heads, *rows, strict=True)]
    room = width - min(widths[0], width // 2)
    parts: list[list[int]] = [[]]
    left = room
    for column in range(1, len(heads)):
        needed = min(widths[column] + _GAP, room)
        if needed > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= needed
    tables = []
    for part in parts:
        columns = [0, *part]
        broken = [place for place, column in enumerate(columns) if not place or widths[column] + _GAP > room]
        picked = [[row[column] for column in columns] for row in (heads, *rows)]
        tables.append(table(picked[0], picked[1:], words=broken))
    return tables


def as_text(view: RenderableType, width: int | None = None) -> str:
    """Plain text of what rich shows, without spaces at the ends of lines; `width` None: lines as long as they are."""
    console = Console(width=width or _UNLIMITED, highlight=False, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(view)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))


def terminal_width() -> int | None:
    """The columns of the terminal that stdout is; None where it is none."""
    return Console().width if sys.stdout.isatty() else None


def show(view: RenderableType, width: int | None = WIDTH) -> None:
    """Prints on stdout: with colours on a terminal, as text of this width elsewhere."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(view)
    else:
        print(as_text(view, width))
