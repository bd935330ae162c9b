"""A report as people see it: tables for the terminal, and a web page without network or scripts.

Both read the same without colours.
"""

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mora_jax.data.conversation import Side
from mora_jax.data.dataset import EncodedDataset, Example
from mora_jax.data.inspect.advice import Advice, advise_on, advise_on_capacity
from mora_jax.data.inspect.report import CAUSES, NEAR_EMPTY, Report
from mora_jax.data.loss_weights import LossWeights, normalize
from mora_jax.data.segments import Segment
from mora_jax.data.sources import Source
from mora_jax.data.tokens.store import instruction_ids
from mora_jax.display.pages import page_template
from mora_jax.display.tables import table
from mora_jax.paths import OFF

_REPLACEMENT = "\ufffd"


def visible(text: str) -> str:
    """The text with a sign before each line's end, and control characters written out."""
    signs = {"\n": "↵\n", "\t": "⇥"}
    return "".join(char if char.isprintable() else signs.get(char, ascii(char)[1:-1]) for char in text)


def token_texts(input_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token adds; together they are the decoded text.

    A character whose bytes are spread over several tokens is given to the last of them, the others are empty.

    Args:
      input_ids: `[T]`.
      tokenizer: a `transformers` tokenizer.
    """
    ids = [int(token) for token in input_ids]

    def decode(start: int, stop: int) -> str:
        return tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts = []
    # Tokens before `done` are told; those from `context` on are decoded again for their spaces.
    context = done = 0
    for stop in range(1, len(ids) + 1):
        told, text = decode(context, done), decode(context, stop)
        if text.endswith(_REPLACEMENT) and stop < len(ids) and stop - done < 4:
            texts.append("")
            continue
        texts.append(text[len(told) :])
        context, done = done, stop
    return texts


def first_examples(dataset: EncodedDataset, count: int) -> list[Example]:
    """The first examples of a data set; a pair is one, with both answers."""
    return dataset[: count * (2 if Side.CHOSEN in dataset.sides else 1)]


def training_weights(example: Example) -> np.ndarray:
    """The weights of an example's tokens as the normaliser `token` sums them: `[T]`, with the row's own weight.

    Of a judged answer those in its log-probability.
    """
    if example.answer_weights is not None:
        return example.answer_weights * np.float32(example.weight)
    return normalize(example.weights, example.segments, example.weight, "token")[0]


def describe_example(example: Example, tokenizer: Any) -> list[tuple[str, float, str]]:
    """Tokens to be shown in colours.

    Args:
      example: an encoded row.
      tokenizer: the tokenizer that encoded it.

    Returns:
      For each token its text, the weight of predicting it (see `training_weights`), and the name of its segment.
    """
    texts = token_texts(example.input_ids.tolist(), tokenizer)
    names = [Segment(segment).label for segment in example.segments.tolist()]
    return list(zip(texts, training_weights(example).tolist(), names, strict=True))


def describe_batch(batch: Mapping[str, np.ndarray]) -> str:
    """A batch in words: its arrays, and what each row holds.

    Args:
      batch: what `EncodedDataset.batch` gives, or with a leading axis of micro-batches.
    """
    lines = [f"{name:>12}  {array.dtype.name:8} {list(array.shape)}" for name, array in batch.items()]
    length = batch["segment_ids"].shape[-1]
    rows = (batch[name].reshape(-1, length) for name in ("segment_ids", "weights"))
    for number, (segment_ids, weights) in enumerate(zip(*rows, strict=True)):
        padding, trained = int((segment_ids == 0).sum()), int(np.count_nonzero(weights))
        examples = f"{int(segment_ids.max(initial=0))} examples"
        lines.append(f"{f'row {number}':>12}  {examples}, {trained} of {length} tokens trained, {padding} padding")
    return "\n".join(lines)


# Characters of a repeated prompt that are shown.
_SHOWN = 80


# What is told of a report under its own name.
_TOLD = (
    *("format", "files", "rows", "kept", "dropped", "truncated", "split", "tokens", "trained_tokens"),
    *("trained_fraction", "ratio", "max_length", "recommended_max_length", "seam_rows", "special_rows", "fell_back"),
    *("template", "mode", "notes"),
)


def inspect_data(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    mode: str = "masked",
    prompt_weight: float = 0.0,
    max_length: int = 512,
    truncation: str = "right",
    examples: int = 0,
    **source: Any,
) -> dict[str, Any]:
    """Encodes data files and reports on them.

    Args:
      paths: one file or several.
      tokenizer: a fast `transformers` tokenizer.
      mode: a loss mode, see `MODES`.
      prompt_weight: weight of instruction tokens in `weighted` and `wit`.
      max_length: the most tokens of an example.
      truncation: see `TRUNCATIONS`.
      examples: how many encoded rows to give along.
      **source: see `Source`, such as `format` and `template`.

    Returns:
      See `inspect_dataset`.
    """
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    settings: dict[str, Any] = {"cache": OFF, "workers": 1} | source
    where = Source(tuple(os.fspath(name) for name in names), **settings)
    loss = LossWeights(mode, prompt_weight)
    special = tokenizer.all_special_ids
    dataset = EncodedDataset(where.load(tokenizer), loss, max_length, truncation, special_ids=special)
    return inspect_dataset(dataset, examples)


def inspect_dataset(dataset: EncodedDataset, examples: int = 0) -> dict[str, Any]:
    """What there is to say of a data set.

    Args:
      dataset: the encoded rows.
      examples: how many of them to give along.

    Returns:
      An object that JSON can hold. Rows: `format`, `files`, `template`, `rows`, `kept`, `dropped` (by cause),
      `truncated`, `split`, `bad_rows` (what was wrong with the first of them). Loss: `mode`, `loss` (its settings),
      `tokens`, `trained_tokens`, `trained_fraction`, `segments` (tokens of each kind and their mean weight,
      before any cut), `ratio`
      (instruction tokens for each response token) and `ratio_median` (the median of the rows). Lengths: `lengths`,
      `histogram` (`from`: the classes' lower ends, and `rows`), `max_length`, `over_max_length` (rows),
      `lost_fraction` (of the trained tokens), `recommended_max_length`. What else to look at: `duplicates`,
      `near_empty`, `judged` (rows by how their answer is judged), `seam_rows`, `special_rows`, `fell_back`, `notes`,
      `advice` (one line that begins with the mode),
      `advice_details` and `capacity` (one line on the trained parameters that the data can need). Then
      `examples`: a list of `input_ids`, `weights` and `segments` (names), where `weights[i]` is the weight of
      predicting token i, with the row's own weight in it, and of a judged answer that in its log-probability.
    """
    report, advice = dataset.report, advise_on(dataset.report)
    details = asdict(advice) | {"evidence": list(advice.evidence), "limits": list(advice.limits)}
    del details["reason"]
    starts, rows = report.histogram()
    return {name: getattr(report, name) for name in _TOLD} | {
        "bad_rows": report.reasons,
        "segments": {name: {"tokens": n, "mean_weight": weight} for name, n, weight in segment_table(report)},
        "ratio_median": report.median_ratio,
        "lengths": report.quantiles,
        "histogram": {"from": starts.tolist(), "rows": rows.tolist()},
        "over_max_length": report.over_length,
        "lost_fraction": report.lost_share,
        "duplicates": {"rows": report.duplicated, "fraction": report.duplicated_share},
        "near_empty": {"rows": report.near_empty, "at_most_tokens": NEAR_EMPTY},
        "judged": {side.name.lower(): int((report.sides == side).sum()) for side in Side if side in report.sides},
        "loss": asdict(dataset.loss) | {"roles": list(dataset.loss.roles)},
        "advice": advice.text,
        "advice_details": details,
        "capacity": advise_on_capacity(report.trained_tokens),
        "examples": [
            {
                "input_ids": example.input_ids.tolist(),
                "weights": training_weights(example).tolist(),
                "segments": [Segment(segment).label for segment in example.segments.tolist()],
            }
            for example in first_examples(dataset, examples)
        ],
    }


def segment_table(report: Report) -> list[tuple[str, int, float]]:
    """The kinds of tokens that occur, before any cut: name, tokens, and the mean of their weights."""
    counts, weights = defaultdict[str, int](int), defaultdict[str, float](float)
    for segment in Segment:
        counts[segment.label] += int(report.by_segment[segment])
        weights[segment.label] += float(report.weight_by_segment[segment])
    return [(name, count, weights[name] / count) for name, count in counts.items() if count]


def repeated_prompts(dataset: EncodedDataset, tokenizer: Any, most: int = 3) -> list[tuple[str, int]]:
    """The instructions that most rows share.

    Args:
      dataset: the encoded rows, all of their store.
      tokenizer: the tokenizer that encoded them.
      most: how many to give.

    Returns:
      The beginning of each instruction, and how many rows ask it; those that are asked more than once.
    """
    values, first, counts = np.unique(dataset.report.prompts, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    chosen = [place for place in order.tolist() if values[place] and counts[place] > 1][:most]
    told = []
    for place in chosen:
        asked = instruction_ids(dataset.store[int(first[place])])
        text = visible(" ".join(tokenizer.decode(asked[: 2 * _SHOWN].tolist()).split()))
        told.append((text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...", int(counts[place])))
    return told


# Columns of the longest bar, where there is room for it beside the other columns.
_BAR, _SHORTEST_BAR = 36, 8
_STYLES = {"on": "green", "part": "yellow", "off": "dim"}


def facts(report: Report, loss: str, recognised: bool) -> list[tuple[str, str]]:
    """What is said of a data set before any table: names and words, with control characters written out."""
    how = "recognised from the first rows; --format names another" if recognised else "as asked"
    trained = f"{report.trained_fraction:.1%} of the kept tokens carry loss"
    rows = [
        ("data", ", ".join(report.files) or "memory"),
        ("format", f"{report.format or 'none'} ({how})"),
        ("template", report.template),
        ("loss mode", loss),
        ("trained", f"{trained} ({report.trained_tokens:,} of {report.tokens:,})"),
        ("ratio", report.ratio_words),
        *((("judged", report.judged_words),) if report.judged_words else ()),
        *(("bad row", reason) for reason in report.reasons),
        *(("note", note) for note in report.notes),
    ]
    return [(name, visible(text)) for name, text in rows]


def outcomes(report: Report) -> list[tuple[str, str, str]]:
    """What became of the rows, in words, with how many and their share; then what is odd about some of those kept."""
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
    rows += [(f"  {outcome}", n) for outcome, n in odd if n]
    return [(outcome, f"{n:,}", f"{n / report.rows:.1%}" if report.rows else "") for outcome, n in rows]


def segments(report: Report) -> list[dict[str, Any]]:
    """The kinds of tokens, before any cut, as rows of a table with bars."""
    rows = segment_table(report)
    total = sum(count for _, count, _ in rows)
    return [
        {"cells": (name, f"{n:,}", f"{n / total:.1%}", f"{weight:.3g}"), "share": n / total, "kind": _kind(weight)}
        for name, n, weight in rows
    ]


def lengths(report: Report) -> list[dict[str, Any]]:
    """The classes of lengths, before any cut, as rows of a table with bars, and the limits that lie in each."""
    starts, rows = (values.tolist() for values in report.histogram())
    step = starts[1] - starts[0] if len(starts) > 1 else 1
    limits = {"max_length": report.max_length, "recommended": report.recommended_max_length}
    classes = []
    for start, stop, n in zip(starts, [*starts[1:], None], rows, strict=True):
        inside = [f"{name} {n}" for name, n in limits.items() if n and start <= n and (stop is None or n < stop)]
        label = f"{start}+" if stop is None else f"{start}-{start + step - 1}"
        long = bool(report.max_length) and start >= report.max_length
        share, mark = n / max(*rows, 1), f"<- {', '.join(inside)}" if inside else ""
        classes.append({"cells": (label, f"{n:,}"), "share": share, "kind": "long" if long else "count", "mark": mark})
    return classes


def _kind(weight: float) -> str:
    return "on" if weight >= 1 else "part" if weight > 0 else "off"


def report_view(dataset: EncodedDataset, tokenizer: Any, console: Console, *, recognised: bool = True) -> Group:
    """The report of a data set as something to print.

    Args:
      dataset: the encoded rows, all of their store.
      tokenizer: the tokenizer that encoded them.
      console: where it will be printed.
      recognised: whether the format was found out, not named.
    """
    report = dataset.report
    advice, repeated = advise_on(report), repeated_prompts(dataset, tokenizer)
    shape = ", ".join(f"{name} {value:,}" for name, value in report.quantiles.items())
    parts: dict[str, Sequence[RenderableType]] = {
        "Rows by outcome": [table(("", "rows", "share"), outcomes(report))],
        "Tokens, before any cut": [_bars(("", "tokens", "share", "mean weight"), segments(report), console)],
        "Row lengths in tokens, before any cut": [
            _bars(("tokens", "rows"), lengths(report), console),
            _indented(f"{shape}\nmax_length {report.length_words}"),
        ],
        "Most repeated instructions": [table(("", "rows"), [(text, f"{n:,}") for text, n in repeated])],
        f"Advice on the loss mode (confidence: {advice.confidence})": [_advice(advice)],
        "Advice on trained parameters": [_indented(advise_on_capacity(report.trained_tokens))],
    }
    if not repeated:
        del parts["Most repeated instructions"]
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold", justify="right")
    head.add_column(overflow="fold")
    for name, text in facts(report, dataset.loss.words, recognised):
        head.add_row(name, Text(text))
    return Group(head, *itertools.chain(*((Text(f"\n{title}", style="bold"), *part) for title, part in parts.items())))


def _indented(text: str) -> Padding:
    return Padding(Text(text), (0, 0, 0, 1))


def _bars(heads: Sequence[str], rows: Sequence[dict[str, Any]], console: Console) -> Table:
    """A table with a bar in each row, and what is marked behind it."""
    texts = [(*row["cells"], row.get("mark", "")) for row in rows]
    taken = sum(max(map(len, column)) + 3 for column in zip((*heads, ""), *texts, strict=True))
    # A bar that is wrapped would say something else.
    longest = max(_SHORTEST_BAR, min(_BAR, console.width - taken))
    char = "█" if console.encoding.lower().startswith("utf") else "#"
    cells = []
    for row, (*texts_before, mark) in zip(rows, texts, strict=True):
        bar = char * max(round(longest * row["share"]), int(row["share"] > 0))
        cells.append((*texts_before, Text(bar, style=_STYLES.get(row["kind"], "cyan")), mark))
    return table((*heads, "", ""), cells, words=(0, len(heads), len(heads) + 1))


def _advice(advice: Advice) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=9, style="dim")
    grid.add_column()
    grid.add_column(overflow="fold")
    grid.add_row("", "", Text.assemble((advice.mode, "bold"), f": {advice.reason}"))
    for name, lines in (("evidence", advice.evidence), ("limits", advice.limits)):
        for place, line in enumerate(lines):
            grid.add_row("" if place else name, "-", Text(line))
    return grid


def make_page(dataset: EncodedDataset, tokenizer: Any, examples: int = 3, *, recognised: bool = True) -> str:
    """The page of a data set.

    Args:
      dataset: the encoded rows, all of their store.
      tokenizer: the tokenizer that encoded them.
      examples: how many examples to show.
      recognised: whether the format was found out, not named.

    Returns:
      HTML. Whatever comes from the data is escaped, and control characters are written out.
    """
    report = dataset.report
    return page_template("page.html.jinja", Path(__file__).parent).render(
        report=report,
        names=[os.path.basename(name.rstrip("/")) or name for name in report.files] or ["rows in memory"],
        facts=facts(report, dataset.loss.words, recognised),
        outcomes=outcomes(report),
        segments=segments(report),
        lengths=lengths(report),
        repeated=repeated_prompts(dataset, tokenizer, most=5),
        advice=advise_on(report),
        capacity=advise_on_capacity(report.trained_tokens),
        examples=[
            {
                "source": example.source,
                "tokens": len(example),
                "trained": int((training_weights(example) > 0).sum()),
                "weight": example.weight,
                "runs": list(_runs(example, tokenizer)),
            }
            for example in first_examples(dataset, examples)
        ],
    )


def _runs(example: Example, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """An example as runs of tokens of one weight and segment."""
    numbered = enumerate(zip(example.input_ids.tolist(), describe_example(example, tokenizer), strict=True))
    for (weight, segment), members in itertools.groupby(numbered, key=lambda item: item[1][1][1:]):
        tokens = [
            {"text": visible(text), "title": f"token {place}: id {token}, weight {weight:.3g}, {segment}"}
            for place, (token, (text, _, _)) in members
        ]
        yield {"weight": f"{weight:.3g}", "kind": _kind(weight), "segment": segment, "tokens": tokens}
