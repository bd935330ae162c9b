"""The demo's one table: whole at 80 columns, and at 60 with each method on a line of its own."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from mora_jax.demo.measure import Scores

COLUMNS = (
    "method",
    "loss",
    "trained params",
    "exact match",
    "F1",
    "response ppl",
    "base-text ppl",
    "tokens/s",
)
LEGEND = "ppl: perplexity; on base text it rises as that is forgotten"


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
        scores = self.scores
        return (
            self.method,
            self.mode,
            f"{self.trainable:,}" if self.before else "-",
            f"{scores.exact_match:.1%}",
            f"{scores.f1:.1%}",
            f"{scores.response_perplexity:,.2f}",
            f"{scores.base_perplexity:,.2f}",
            "-" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}",
        )


def print_table(rows: Sequence[Row], title: str, stream: TextIO | None = None) -> None:
    """Prints the table to `stream`, by default stdout, as wide as its terminal allows."""
    stream = sys.stdout if stream is None else stream
    lines = [row.cells() for row in rows]
    shown = _laid_out(COLUMNS, lines, 2, "  ")
    if stream.isatty() and len(shown[-1]) > shutil.get_terminal_size().columns:
        shown = _grouped(lines)
    print(title, LEGEND, "", *shown, sep="\n", file=stream)


def _grouped(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """The table without its first column, whose texts stand above the lines that share them."""
    shown = [f"  {line}" for line in _laid_out(COLUMNS[1:], [line[1:] for line in lines], 1, " ")]
    body = iter(shown[-len(lines) :])
    grouped = shown[: -len(lines)]
    for method, group in itertools.groupby(line[0] for line in lines):
        grouped += [method, *itertools.islice(body, len(list(group)))]
    return grouped


def _laid_out(columns: Sequence[str], lines: Sequence[tuple[str, ...]], texts: int, gap: str) -> list[str]:
    """The head, a word of each column a line; a rule; the lines. The first `texts` columns are no numbers."""
    words = [column.split() for column in columns]
    height = max(map(len, words))
    head = list(zip(*([""] * (height - len(column)) + column for column in words), strict=True))
    widths = [max(map(len, cells)) for cells in zip(*head, *lines, strict=True)]

    def laid_out(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return gap.join(cell.ljust(width) if i < texts else cell.rjust(width) for i, (cell, width) in pairs)

    rule = "-" * (sum(widths) + len(gap) * (len(widths) - 1))
    return [*(laid_out(cells).rstrip() for cells in head), rule, *map(laid_out, lines)]
