"""What the demo shows: one question with its answers, the table, what of it is a difference, and the picture.

The table is whole at 80 columns and continued below itself at 60.
"""

import math
import shutil
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mora_jax.demo.answers import exact_match
from mora_jax.demo.cells import MODES, Scores
from mora_jax.display.figures import new_figure, plain_log, style, write_figure
from mora_jax.display.tables import as_text, fitted

COLUMNS = ("method", "loss", "trained params", "exact match", "F1", "response ppl", "base-text ppl", "tokens/s")
LEGEND = """\
exact match, F1: of the answers with the right ones, as texts and word by word
response ppl: perplexity of the right answers; 1 would be certain of each token
base-text ppl: of text like that read before; it rises as that is forgotten"""
#: By how much a figure of one seed has moved by rounding alone (docs/measurements.md), in points of exact match.
ROUNDING = 5.0
#: Standard errors of the largest of six differences among four methods that chance exceeds once in twenty times.
LARGEST = 2.64


class Question(NamedTuple):
    """A test question and its right answer."""

    text: str
    right: str


@dataclass(frozen=True)
class Row:
    """One line: the base model, or a fine-tuned one.

    Attributes:
      method, mode: of the cell; of the base model its name and a dash.
      scores: its figures.
      trainable: numbers that were trained; 0 for the base model.
      tokens_per_second, wall_seconds: of the training, and of all with the answers.
      curve: the validation loss, on the held-out answers in nats a token, while it was trained: `steps` and
        `held_out_loss`, lists.
    """

    method: str
    mode: str
    scores: Scores
    trainable: int = 0
    tokens_per_second: float | None = None
    wall_seconds: float | None = None
    curve: Mapping[str, list[Any]] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """The line's texts, one for each of `COLUMNS`."""
        scores = self.scores
        return (
            self.method,
            self.mode,
            f"{self.trainable:,}" if self.trainable else "-",
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


def print_answers(rows: Sequence[Row], asked: Sequence[Question], stream: TextIO | None = None) -> None:
    """Prints one question with every model's answer: the first that the base gets wrong and the first tuned one right.

    Args:
      rows: the table's lines, the base model first.
      asked: the questions.
      stream: where to; by default stdout.
    """
    answers = [row.scores.answers for row in rows]

    def learned(number: int) -> bool:
        base, tuned = (exact_match(given[number], asked[number].right) for given in answers[:2])
        return tuned > base

    number = next(filter(learned, range(len(asked))), 0)
    lines = [("right answer", asked[number].right)]
    for row, given in zip(rows, answers, strict=True):
        lines.append((row.method if row.mode == "-" else f"{row.method}, {row.mode}", given[number]))
    print(f"One question, and what each model answers: {asked[number].text}", file=stream)
    for name, answer in lines:
        print(f"  {name:24} {textwrap.shorten(answer, 52, placeholder=' …')}".rstrip(), file=stream)
    print(file=stream)


def print_verdict(rows: Sequence[Row], asked: Sequence[Question], stream: TextIO | None = None) -> None:
    """Prints for each loss mode whether the best and the worst method differ by more than chance.

    The bound is of the largest difference among four methods: over questions in pairs, and by rounding in both.

    Args:
      rows: the table's lines.
      asked: the questions.
      stream: where to; by default stdout.
    """
    print(file=stream)
    for mode in MODES:
        tuned = sorted((row for row in rows if row.mode == mode), key=lambda row: row.scores.exact_match)
        if len(tuned) < 2 or len(asked) < 2:
            continue
        worst, best = tuned[0], tuned[-1]
        hits = [
            [exact_match(given, question.right) for given, question in zip(row.scores.answers, asked, strict=True)]
            for row in (worst, best)
        ]
        differences = [100 * (right - other) for other, right in zip(*hits, strict=True)]
        lead = statistics.fmean(differences)
        error = statistics.stdev(differences) / len(differences) ** 0.5
        bound = math.hypot(LARGEST * error, 2**0.5 * ROUNDING)
        text = f"{mode}: {best.method} is {lead:.1f} points above {worst.method} in exact match"
        if lead <= bound:
            text += f"; below {bound:.1f} points that is chance, so these methods do not differ here."
        else:
            text += f", more than the {bound:.1f} of chance on these questions; another seed may still change it."
        print(textwrap.fill(text, 78), file=stream)
    print("One seed, one rate a method: three seeds and intervals are in the notebooks and studies.", file=stream)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes the picture as PNG: validation loss over the training, and what was gained and forgotten.

    Args:
      rows: the table's lines, the base model first.
      path: where to.
    """
    from matplotlib.lines import Line2D

    figure = new_figure(13, 5.2)
    panels = figure.subplots(1, 3)
    base, *tuned = rows
    styles = {method: style(number) for number, method in enumerate(dict.fromkeys(row.method for row in tuned))}
    losses = [loss for row in tuned for loss in row.curve["held_out_loss"]]
    for panel, mode in zip(panels, MODES, strict=False):
        for row in tuned:
            if row.mode == mode:
                panel.plot(row.curve["steps"], row.curve["held_out_loss"], **styles[row.method], markersize=5)
        plain_log(panel, "y", (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
        panel.set(title=f"Trained with {mode} loss", ylim=(min(losses) / 1.2, max(losses) * 1.2))
        panel.set(xlabel="optimiser step", ylabel="validation loss on answers (nats a token)")
        panel.grid(alpha=0.3)
    _draw_trade(panels[2], base.scores, tuned, styles)
    handles = [Line2D([], [], **look, label=method) for method, look in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    write_figure(figure, path, dpi=130)


def _draw_trade(panel: Any, base: Scores, tuned: Sequence[Row], styles: Mapping[str, Any]) -> None:
    """Learned against forgotten: filled marks for masked, hollow ones for unmasked loss."""
    panel.axvline(base.base_perplexity, color="0.6", linewidth=1, zorder=0)
    panel.plot(base.base_perplexity, 100 * base.exact_match, "*", color="#CC79A7", markersize=15, label="base model")
    for row in tuned:
        colour = styles[row.method]["color"]
        filling = colour if row.mode == "masked" else "white"
        look = styles[row.method] | {"linestyle": "none", "markerfacecolor": filling, "markeredgewidth": 1.6}
        panel.plot(row.scores.base_perplexity, 100 * row.scores.exact_match, **look, markersize=9)
    for filling, label in (("0.3", "filled: masked loss"), ("white", "hollow: unmasked loss")):
        panel.plot([], [], "o", color="0.3", markerfacecolor=filling, markersize=8, label=label)
    plain_log(panel, "x", (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
    panel.set(title="Learned against forgotten", ylim=(-4, 104), ylabel="exact match on test questions (%)")
    panel.set(xlabel="perplexity of base text (grey line: before fine-tuning)")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=9, loc="best")
