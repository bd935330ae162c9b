"""The demo's one table: whole at 80 columns, continued below itself at 60."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from mora_jax.demo.measure import Scores
from mora_jax.display.tables import as_text, fitted

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
    width = shutil.get_terminal_size().columns if stream.isatty() else None
    heads = ["\n".join(column.split()) for column in COLUMNS]
    tables = fitted(heads, [row.cells() for row in rows], width, names=2, words=(0, 1))
    print(title, LEGEND, "", *(as_text(part, width) for part in tables), sep="\n", file=stream)
