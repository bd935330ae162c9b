"""What came of runs as rows of texts, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mora_jax.report.runs import Run, differences, evaluated_alike
from mora_jax.training.display import bytes_words, duration

#: Marks the lowest evaluation loss.
STAR = " *"

# By key: the head of its column, and its values as text.
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "method": ("method", str),
    "trainable_parameters": ("trained", "{:,}".format),
    "steps": ("steps", "{:,}".format),
    "final_loss": ("final loss", "{:.4f}".format),
    "eval_loss": ("eval loss", "{:.4f}".format),
    "eval_perplexity": ("perplexity", "{:,.2f}".format),
    "best_step": ("best step", "{:,}".format),
    "resumed_after": ("resumed after", "{:,}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "wall_seconds": ("time", duration),
    "peak_memory_bytes": ("memory", bytes_words),
}


class ResultTable(NamedTuple):
    """Results of runs.

    Attributes:
        heads: of the columns.
        rows: of texts, a row a run.
        notes: what the star says, or why there is none, and what figures of resumed runs are of.
    """

    heads: list[str]
    rows: list[list[str]]
    notes: list[str]


def result_table(runs: Sequence[Run]) -> ResultTable:
    """A row a run; columns that no run fills are left out.

    The lowest evaluation loss is marked with a star where several runs have one, all of the same data.
    """
    results = [run.results() for run in runs]
    names = list(dict.fromkeys(name for result in results for name in result))
    names.sort(key=lambda name: list(_COLUMNS).index(name) if name in _COLUMNS else len(_COLUMNS))
    names = [name for name in names if any(result.get(name) is not None for result in results)]
    scored = [run for run, result in zip(runs, results, strict=True) if result.get("eval_loss") is not None]
    best, notes = None, []
    if len(scored) > 1 and evaluated_alike(scored):
        best = min(result["eval_loss"] for result in results if result.get("eval_loss") is not None)
        notes.append(f"{STAR.strip()} the lowest evaluation loss")
    elif len(scored) > 1:
        notes.append("the evaluation losses are of different data: they don't compare")
    if any(result.get("resumed_after") for result in results):
        notes.append("of a resumed run tokens/s and time are those of its last process, after that step")
    rows = []
    for run, result in zip(runs, results, strict=True):
        cells = [_cell(name, result.get(name)) for name in names]
        if best is not None and result.get("eval_loss") == best:
            cells[names.index("eval_loss")] += STAR
        rows.append([run.name, *cells, run.state])
    heads = ["run", *(_head(name) for name in names), "state"]
    if all(run.summary for run in runs):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return ResultTable(heads, rows, notes)


def _head(name: str) -> str:
    return _COLUMNS[name][0] if name in _COLUMNS else name.removeprefix("eval_").replace("_", " ")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    return _COLUMNS[name][1](value) if name in _COLUMNS else f"{value:.4g}"


def difference_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a row for each key of the configuration that differs, or for each run where those are more."""
    settings = {key: list(map(_setting, values)) for key, values in differences(runs).items()}
    if len(runs) > len(settings):
        return ["run", *settings], [[run.name, *row] for run, *row in zip(runs, *settings.values(), strict=True)]
    return ["setting", *(run.name for run in runs)], [[key, *row] for key, row in settings.items()]


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
