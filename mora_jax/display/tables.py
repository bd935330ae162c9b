"""Tables for people, laid out by rich: as wide as the terminal, or as plain text where there is none."""

import sys
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

#: Columns of a report where there is no terminal to ask.
WIDTH = 110
# Columns where a line may be as long as it has to.
_UNLIMITED = 10_000
_GAP = 2


def table(heads: Sequence[str], rows: Sequence[Sequence[str | Text]], *, words: Sequence[int] = (0,)) -> Table:
    """A table with a rule below its heads.

    Args:
        heads: a name a column, of one or several lines.
        rows: a text a column, perhaps with a style.
        words: the columns that hold words, set to the left; the others hold numbers, which are never broken.
    """
    laid_out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for column, head in enumerate(heads):
        if column in words:
            laid_out.add_column(Text(head), overflow="fold", vertical="bottom")
        else:
            laid_out.add_column(Text(head), justify="right", no_wrap=True, vertical="bottom")
    for row in rows:
        laid_out.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return laid_out


def fitted(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None,
    *,
    names: int = 1,
    words: Sequence[int] = (0,),
) -> list[Table]:
    """A table as one or several, each at most `width` wide: all have the first columns, and each some of the others.

    Only a text that alone is wider than there is room for is broken over lines.

    Args:
        heads, rows, words: see `table`.
        width: in characters; None: one table.
        names: how many columns are in each, those that say what a row is of.
    """
    if width is None:
        return [table(heads, rows, words=words)]
    lines = [[line for text in column for line in text.split("\n")] for column in zip(heads, *rows, strict=True)]
    widths = [_GAP + max(map(cell_len, column)) for column in lines]
    room = width - min(sum(widths[:names]), width // 2)
    parts: list[list[int]] = [[]]
    for column in range(names, len(heads)):
        taken = sum(min(widths[other], room) for other in parts[-1])
        if parts[-1] and taken + min(widths[column], room) > room:
            parts.append([])
        parts[-1].append(column)
    tables = []
    for part in parts:
        columns = [*range(names), *part]
        folded = [place for place, column in enumerate(columns) if column in words or widths[column] > room]
        head, *body = ([row[column] for column in columns] for row in (heads, *rows))
        tables.append(table(head, body, words=folded))
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
