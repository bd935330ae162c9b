"""The demo's one table: rich on a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from mora_jax.demo.measure import Scores

COLUMNS = (
    "method",
    "loss",
    "trainable parameters",
    "exact match",
    "F1",
    "response perplexity",
    "base-text ppl before",
    "base-text ppl after",
    "tokens/s",
)


@dataclass(frozen=True)
class Row:
    """One line: the base model (`before` is None), or a fine-tuned one beside it."""

    method: str
    mode: str
    trainable: int
    scores: Scores
    before: Scores | None = None
    tokens_per_second: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The line's texts, one for each of `COLUMNS`."""
        after, before = self.scores, self.before
        return (
            self.method,
            self.mode,
            f"{self.trainable:,}" if before else "-",
            f"{after.exact_match:.1%}",
            f"{after.f1:.1%}",
            f"{after.response_perplexity:,.2f}",
            f"{(before or after).base_perplexity:.2f}",
            f"{after.base_perplexity:,.2f}" if before else "-",
            "-" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}",
        )


def print_table(rows: Sequence[Row], title: str, stream: TextIO | None = None) -> None:
    """Prints the table to `stream`, by default stdout."""
    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if index < 2 else "right")
        for row in rows:
            table.add_row(*row.cells())
        Console(file=stream).print(table)
        return
    lines = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    print(title, file=stream)
    for line in lines:
        texts = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(texts).rstrip(), file=stream)
