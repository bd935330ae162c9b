"""A look at a data file: which of its tokens carry loss, and how long its rows are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mora_jax.data.dataset import EncodedDataset
from mora_jax.data.loading import load_rows
from mora_jax.data.segments import Segment


def inspect_data(
    paths: str | Path | Iterable[str | Path],
    tokenizer: Any,
    *,
    format: str | None = None,
    examples: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Encodes a data file and reports on it.

    Args:
      paths: one file or several.
      tokenizer: a fast `transformers` tokenizer.
      format: see `load_rows`.
      examples: how many encoded rows to give along.
      **settings: see `EncodedDataset.build`.

    Returns:
      An object that JSON can hold: `format`, `rows`, `kept`, `dropped` (by cause), `truncated`, `tokens`,
      `trained_tokens`, `trained_fraction`, `ratio` (instruction tokens for each response token), `lengths`,
      `recommended_max_length`, `template`, `mode`, `notes`, and `examples`: a list of `input_ids`, `weights`
      and `segments` (names), where `weights[i]` is the weight of predicting token i.
    """
    rows = load_rows(paths, format)
    dataset = EncodedDataset.build(rows, tokenizer, **settings)
    report = dataset.report
    return {
        "format": rows.format,
        "rows": report.rows,
        "kept": report.kept,
        "dropped": report.dropped,
        "truncated": report.truncated,
        "tokens": report.tokens,
        "trained_tokens": report.trained_tokens,
        "trained_fraction": report.trained_fraction,
        "ratio": report.ratio,
        "lengths": report.quantiles,
        "recommended_max_length": report.recommended_max_length,
        "seam_rows": report.seam_rows,
        "special_rows": report.special_rows,
        "template": report.template,
        "mode": report.mode,
        "notes": report.notes,
        "examples": [
            {
                "input_ids": example.input_ids.tolist(),
                "weights": example.weights.tolist(),
                "segments": [Segment(segment).label for segment in example.segments.tolist()],
            }
            for example in dataset.examples[:examples]
        ],
    }
