"""An example for the eye: which of its tokens carry loss."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mora_jax.training.display.plain import Pieces, printable

# Tokens as `mora_jax.data.describe_example` gives them: text, weight and name of the segment.
Described = Sequence[tuple[str, float, str]]

TRAINED = "bold green underline"  # readable without colour too
PARTLY = "yellow underline"
SHOWN_LINES = 16


def token_text(pieces: Pieces) -> Text:
    """Returns tokens as one text in which those that carry loss are marked.

    Args:
        pieces: a weight between 0 and 1 gets its own colour.
    """
    text = Text()
    for piece, weight in pieces:
        style = TRAINED if weight >= 1 else PARTLY if weight > 0 else "dim"
        text.append(printable(piece), style=style)
    return text


def legend(partly: bool) -> Text:
    """Returns the key to `token_text`, with or without the colour of weights between 0 and 1."""
    middle = (("carries a part", PARTLY), "  ") if partly else ()
    return Text.assemble(("carries loss", TRAINED), "  ", *middle, ("carries none", "dim"))


def window(lines: Sequence[Text], size: int = SHOWN_LINES) -> list[Text]:
    """Returns at most `size` of an example's lines, so that the first trained one is among them."""
    marked = (TRAINED, PARTLY)
    trained = [place for place, line in enumerate(lines) if any(span.style in marked for span in line.spans)]
    start = max(0, min(trained[0] - size // 2, len(lines) - size)) if trained else 0
    shown = list(lines[start : start + size])
    if start:
        shown.insert(0, Text(f"... {start} lines before", style="italic"))
    after = len(lines) - start - size
    if after > 0:
        shown.append(Text(f"... {after} lines after", style="italic"))
    return shown


def example_panel(pieces: Pieces, title: str, console: Console, size: int | None = SHOWN_LINES) -> Panel:
    """Returns a panel with an example's text, its trained tokens marked.

    Args:
        pieces: the example's tokens.
        title: of the panel.
        console: where it will be printed.
        size: lines shown at most; None for all.
    """
    text = token_text(pieces)
    text.rstrip()
    lines = list(text.wrap(console, console.width - 4))
    partly = any(0 < weight < 1 for _, weight in pieces)
    return Panel(
        Group(*(lines if size is None else window(lines, size))),
        title=title,
        title_align="left",
        subtitle=legend(partly),
        subtitle_align="left",
        border_style="cyan",
    )


def example_lines(described: Described) -> Iterator[str]:
    """Yields an example as plain lines: weight, segment and text of each run of tokens that share both."""
    for (weight, segment), run in itertools.groupby(described, key=lambda piece: piece[1:]):
        yield f"{weight:5.3g}  {segment:12} {''.join(text for text, _, _ in run)!r}"


def example_table(described: Described) -> Table:
    """Returns an example as a table: weight, segment and text of each run of tokens that share both.

    The text is marked by weight; the numbers say the same without colour or underline.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", min_width=5)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for (weight, segment), run in itertools.groupby(described, key=lambda piece: piece[1:]):
        # A line's end is part of its token, and would not be seen at the end of a run.
        text = token_text([(piece.replace("\n", "↵\n"), piece_weight) for piece, piece_weight, _ in run])
        text.rstrip()
        table.add_row(f"{weight:.3g}", segment, text)
    return table


def print_examples(examples: Iterable[tuple[str, Described]], console: Console) -> None:
    """Prints examples: as tables with marked tokens on a terminal, as plain lines elsewhere.

    Args:
        examples: where each comes from, and its tokens.
        console: where to print.
    """
    for number, (source, described) in enumerate(examples, 1):
        trained = sum(weight > 0 for _, weight, _ in described)
        title = f"example {number}: {source or 'a row'}, {len(described)} tokens, {trained} trained"
        if console.is_terminal:
            console.print(Text(f"\n{title}", style="bold"), example_table(described), sep="\n")
            console.print(legend(any(0 < weight < 1 for _, weight, _ in described)))
        else:
            print(f"\n{title}", *example_lines(described), sep="\n", file=console.file)
