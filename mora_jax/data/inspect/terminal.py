"""A report for the terminal: tables, a histogram of lengths, and the advice. Reads the same without colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mora_jax.data.dataset import EncodedDataset
from mora_jax.data.inspect.advice import Advice, advise_on, advise_on_capacity
from mora_jax.data.inspect.inspecting import repeated_prompts, segment_table, visible
from mora_jax.data.inspect.report import CAUSES, NEAR_EMPTY, Report

# Columns of the longest bar, where there is room for it beside the other columns.
_BAR, _SHORTEST_BAR = 36, 8


def report_view(dataset: EncodedDataset, tokenizer: Any, console: Console, *, recognised: bool = True) -> Group:
    """The report of a data set as something to print.

    Args:
      dataset: the encoded rows, all of their store.
      tokenizer: the tokenizer that encoded them.
      console: where it will be printed.
      recognised: whether the format was found out, not named.
    """
    report, loss = dataset.report, dataset.loss.words
    advice, repeated = advise_on(report), repeated_prompts(dataset, tokenizer)
    bar = "█" if console.encoding.lower().startswith("utf") else "#"
    parts: list[RenderableType] = [_facts(report, loss, recognised), _title("Rows by outcome"), _outcomes_table(report)]
    parts += [_title("Tokens, before any cut"), _segments(report, bar, console.width)]
    parts += [
        _title("Row lengths in tokens, before any cut"),
        _lengths(report, bar, console.width),
        _length_words(report),
    ]
    if repeated:
        parts += [_title("Most repeated instructions"), _repeated(repeated)]
    parts += [_title(f"Advice on the loss mode (confidence: {advice.confidence})"), _advice(advice)]
    capacity = Padding(Text(advise_on_capacity(report.trained_tokens)), (0, 0, 0, 1))
    parts += [_title("Advice on trained parameters"), capacity]
    return Group(*parts)


def _title(words: str) -> Text:
    return Text(f"\n{words}", style="bold")


def _table(*columns: str) -> Table:
    """A table whose first column is words and whose others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True, padding=(0, 1), show_edge=False, header_style="dim")
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 or not name else "right", overflow="fold")
    return table


def _facts(report: Report, loss: str, recognised: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", justify="right")
    table.add_column(overflow="fold")
    found = "recognised from the first rows; --format names another" if recognised else "as asked"
    rows = [("data", ", ".join(report.files) or "memory"), ("format", f"{report.format or 'none'} ({found})")]
    rows += [("template", report.template), ("loss mode", loss)]
    trained = f"{report.trained_fraction:.1%} of the kept tokens carry loss"
    rows.append(("trained", f"{trained} ({report.trained_tokens:,} of {report.tokens:,})"))
    rows.append(("ratio", report.ratio_words))
    rows += [("judged", report.judged_words)] if report.judged_words else []
    rows += [("bad row", reason) for reason in report.reasons]
    rows += [("note", note) for note in report.notes]
    for name, words in rows:
        table.add_row(name, Text(visible(words)))
    return table


def outcomes(report: Report) -> list[tuple[str, int]]:
    """What became of the rows, in words, with how many rows; then what is odd about some of those kept."""
    rows = [("read", report.rows)]
    rows += [(f"dropped: {CAUSES[cause]}", n) for cause, n in report.dropped.items()]
    rows.append(("kept (examples)", report.kept))
    odd = [
        ("cut to max_length", report.truncated),
        ("split into several examples", report.split),
        ("rendered by the fallback template", report.fell_back),
        ("ask what an earlier row asks", report.duplicated),
        (f"answered in {NEAR_EMPTY} tokens or fewer", report.near_empty),
        ("a token joins the answer to what is around it", report.seam_rows),
        ("own words hold a special token", report.special_rows),
    ]
    return rows + [(f"  {words}", n) for words, n in odd if n]


def _outcomes_table(report: Report) -> Table:
    table = _table("", "rows", "share")
    for words, n in outcomes(report):
        table.add_row(Text(words), f"{n:,}", f"{n / report.rows:.1%}" if report.rows else "")
    return table


def _bar_width(width: int, others: int) -> int:
    """Columns of the longest bar: one that is wrapped would say something else."""
    return max(_SHORTEST_BAR, min(_BAR, width - others))


def _segments(report: Report, bar: str, width: int) -> Table:
    table = _table("", "tokens", "share", "mean weight", "")
    rows = segment_table(report)
    total = sum(count for _, count, _ in rows)
    # Name, tokens, share and mean weight, with what is between them.
    longest = _bar_width(width, max((len(name) for name, _, _ in rows), default=0) + max(6, len(f"{total:,}")) + 31)
    for name, count, weight in rows:
        style = "green" if weight >= 1 else "yellow" if weight > 0 else "dim"
        drawn = Text(bar * round(longest * count / total), style=style)
        table.add_row(name, f"{count:,}", f"{count / total:.1%}", f"{weight:.3g}", drawn)
    return table


def _lengths(report: Report, bar: str, width: int) -> Table:
    starts, rows = report.histogram()
    table = _table("tokens", "rows", "", "")
    step = int(starts[1] - starts[0]) if len(starts) > 1 else 1
    stops = [*starts.tolist()[1:], None]
    marks = [_marks(report, start, stop) for start, stop in zip(starts.tolist(), stops, strict=True)]
    labels = [
        f"{start}+" if stop is None else f"{start}-{start + step - 1}"
        for start, stop in zip(starts, stops, strict=True)
    ]
    most = max(int(rows.max(initial=0)), 1)
    longest = _bar_width(width, max(map(len, labels)) + max(map(len, marks)) + max(4, len(f"{most:,}")) + 11)
    for label, n, mark in zip(labels, rows.tolist(), marks, strict=True):
        drawn = bar * max(round(longest * n / most), int(n > 0))
        table.add_row(label, f"{n:,}", Text(drawn, style="cyan"), mark)
    return table


def _marks(report: Report, start: int, stop: int | None) -> Text:
    """Which limits lie in a class of lengths."""
    limits = {"max_length": report.max_length, "recommended": report.recommended_max_length}
    inside = [f"{name} {n}" for name, n in limits.items() if n and start <= n and (stop is None or n < stop)]
    return Text(f"<- {', '.join(inside)}" if inside else "")


def _length_words(report: Report) -> Padding:
    shape = ", ".join(f"{name} {value:,}" for name, value in report.quantiles.items())
    lines = [shape, f"recommended max_length: {report.recommended_max_length} (99 of 100 rows fit whole)"]
    if report.max_length:
        lines.append(
            f"max_length {report.max_length}: {report.over_length_share:.1%} of the rows are longer, and "
            f"{report.lost_share:.1%} of the trained tokens are lost"
        )
    return Padding(Text("\n".join(lines)), (0, 0, 0, 1))


def _repeated(repeated: Sequence[tuple[str, int]]) -> Table:
    table = _table("", "rows")
    for text, n in repeated:
        table.add_row(Text(text), f"{n:,}")
    return table


def _advice(advice: Advice) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=9, style="dim")
    table.add_column(overflow="fold")
    table.add_row("", Text.assemble((advice.mode, "bold"), f": {advice.reason}"))
    for name, line in _advice_lines(advice):
        bullet = Table.grid(padding=(0, 1))
        bullet.add_row("-", Text(line))
        table.add_row(name, bullet)
    return table


def _advice_lines(advice: Advice) -> Iterator[tuple[str, str]]:
    for name, lines in (("evidence", advice.evidence), ("limits", advice.limits)):
        for place, line in enumerate(lines):
            yield ("" if place else name), line
