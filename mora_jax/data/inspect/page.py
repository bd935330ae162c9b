"""A report as one web page: no network, no scripts, and weights that can be read without colour vision."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax.data.dataset import EncodedDataset, Example
from mora_jax.data.inspect.advice import advise_on, advise_on_capacity
from mora_jax.data.inspect.inspecting import describe_example, first_examples, repeated_prompts, segment_table, visible
from mora_jax.data.inspect.report import Report
from mora_jax.data.inspect.terminal import outcomes
from mora_jax.display.pages import page_template

# The histogram's drawing, in its own units.
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 250, 8, 52, 34
_BINS = 32


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
        files=", ".join(report.files) or "memory",
        recognised=recognised,
        loss=dataset.loss.words,
        ratio=report.ratio_words,
        outcomes=[(words.strip(), words.startswith(" "), n, _share(n, report.rows)) for words, n in outcomes(report)],
        segments=_segments(report),
        histogram=_histogram(report),
        repeated=repeated_prompts(dataset, tokenizer, most=5),
        advice=advise_on(report),
        capacity=advise_on_capacity(report.trained_tokens),
        examples=[_example(example, tokenizer) for example in first_examples(dataset, examples)],
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _kind(weight: float) -> str:
    return "on" if weight >= 1 else "part" if weight > 0 else "off"


def _segments(report: Report) -> list[dict[str, Any]]:
    rows = segment_table(report)
    total = sum(count for _, count, _ in rows)
    return [
        {"name": name, "tokens": count, "share": count / total, "weight": f"{weight:.3g}", "kind": _kind(weight)}
        for name, count, weight in rows
    ]


def _histogram(report: Report) -> dict[str, Any]:
    """Where the bars, their labels and the limits are drawn."""
    starts, rows = report.histogram(_BINS)
    width = int(starts[1] - starts[0]) if len(starts) > 1 else 1
    step = (_WIDTH - 2 * _LEFT) / len(starts)
    floor = _HEIGHT - _BOTTOM
    scale = (floor - _TOP) / max(int(np.max(rows, initial=0)), 1)
    end = len(starts) - 1
    # Labels so far apart that they don't run into each other, nor into that of the last class.
    every = -(-len(starts) // 11)
    bars = []
    for place, (start, n) in enumerate(zip(starts.tolist(), rows.tolist(), strict=True)):
        range_, label = f"{start} to {start + width - 1} tokens", ""
        if place == end:
            range_, label = f"{start} tokens or more", f"{start}+"
        elif place % every == 0 and place <= end - every:
            label = str(start)
        height = max(scale * n, 1.5) if n else 0.0
        bars.append(
            {
                "x": round(_LEFT + place * step + 1, 1),
                "y": round(floor - height, 1),
                "width": round(step - 2, 1),
                "height": round(height, 1),
                "long": bool(report.max_length) and start >= report.max_length,
                "title": f"{range_}: {n:,} rows",
                "label": label,
                "rows": f"{n:,}" if n and len(starts) <= 20 else "",
            }
        )
    limits = []
    given = (("recommended", report.recommended_max_length), ("max_length", report.max_length))
    for row, (name, value) in enumerate(given):
        if value:
            # Within the last class there is no scale; what is longer than every row stands at the edge.
            classes = float(value - starts[0]) / width if value < starts[-1] else end + 0.5
            beyond = value > report.quantiles["longest"]
            x = _LEFT + step * (end + 1 if beyond else max(classes, 0.0))
            words = f"{name} {value}{' →' if beyond else ''}"
            limits.append({"name": words, "x": round(x, 1), "y": 14 + 16 * row, "right": x > _WIDTH / 2})
    return {"width": _WIDTH, "height": _HEIGHT, "floor": floor, "bars": bars, "limits": limits}


def _example(example: Example, tokenizer: Any) -> dict[str, Any]:
    """An example as runs of tokens of one weight and segment."""
    described = describe_example(example, tokenizer)
    numbered = zip(itertools.count(), example.input_ids.tolist(), described, strict=False)
    runs = []
    for (weight, segment), members in itertools.groupby(numbered, key=lambda item: item[2][1:]):
        tokens = [
            {
                "text": visible(text),
                "title": f"token {place}: id {token}, weight {weight:.3g}, {segment}",
            }
            for place, token, (text, _, _) in members
        ]
        runs.append({"weight": f"{weight:.3g}", "kind": _kind(weight), "segment": segment, "tokens": tokens})
    trained = sum(weight > 0 for _, weight, _ in described)
    facts = {"source": example.source, "tokens": len(described), "trained": trained, "weight": example.weight}
    return facts | {"runs": runs}
