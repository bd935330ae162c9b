"""What came of runs as rows of words, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mora_jax.report.runs import Run, differences
from mora_jax.training.display.plain import duration
from mora_jax.training.display.summary import bytes_words

#: Marks the lowest evaluation loss.
STAR = " *"

_WORDS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "method": ("method", str),
    "trainable_parameters": ("trained", "{:,}".format),
    "steps": ("steps", "{:,}".format),
    "final_loss": ("final loss", "{:.4f}".format),
    "eval_loss": ("eval loss", "{:.4f}".format),
    "eval_perplexity": ("perplexity", "{:,.2f}".format),
    "best_step": ("best step", "{:,}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "wall_seconds": ("time", duration),
    "peak_memory_bytes": ("memory", bytes_words),
}


def result_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row of words a run; columns that no run fills are left out.

    The lowest evaluation loss is marked with a star where several runs have one.
    """
    results = [run.results() for run in runs]
    names = list(dict.fromkeys(name for one in results for name in one))
    names.sort(key=lambda name: list(_WORDS).index(name) if name in _WORDS else len(_WORDS))
    names = [name for name in names if any(one.get(name) is not None for one in results)]
    losses = [one["eval_loss"] for one in results if one.get("eval_loss") is not None]
    best = min(losses) if len(losses) > 1 else None
    rows = []
    for run, one in zip(runs, results, strict=True):
        cells = [_cell(name, one.get(name)) for name in names]
        if best is not None and one.get("eval_loss") == best:
            cells[names.index("eval_loss")] += STAR
        rows.append([run.name, *cells, run.state])
    heads = ["run", *(_head(name) for name in names), "state"]
    if all(run.summary for run in runs):
        return heads[:-1], [row[:-1] for row in rows]
    return heads, rows


def _head(name: str) -> str:
    return _WORDS[name][0] if name in _WORDS else name.removeprefix("eval_").replace("_", " ")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    return _WORDS[name][1](value) if name in _WORDS else f"{value:.4g}"


def difference_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a row for each key of the configuration that differs, or for each run where those are more."""
    found = {key: list(map(_setting, values)) for key, values in differences(runs).items()}
    if len(runs) > len(found):
        return ["run", *found], [[run.name, *row] for run, *row in zip(runs, *found.values(), strict=True)]
    return ["setting", *(run.name for run in runs)], [[key, *row] for key, row in found.items()]


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
