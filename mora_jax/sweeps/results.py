"""What came of a sweep: a row a run, the best of them, as a table, a CSV file and a plot."""

from __future__ import annotations

import csv
import io
import math
import os
from dataclasses import dataclass
from typing import Any

from mora_jax.display.tables import as_text, table
from mora_jax.sweeps.grid import shown
from mora_jax.sweeps.plot import draw
from mora_jax.sweeps.run_result import RunResult

_SCORES = ("final_loss", "eval_loss", "eval_perplexity")


@dataclass
class SweepResult:
    """What `sweep` gives back.

    Attributes:
        runs: in the order of the grid.
        out: the sweep's folder; None where nothing was written.
        exit_code: 0, or what a shell expects after the signal that stopped the sweep before its end.
    """

    runs: list[RunResult]
    out: str | None
    exit_code: int = 0

    @property
    def best(self) -> RunResult | None:
        """The run with the lowest `score`; None if none came to its end."""
        ended = [run for run in self.runs if math.isfinite(run.score)]
        return min(ended, key=lambda run: run.score, default=None)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dictionary a run: `run`, the swept keys, `final_loss`, `eval_loss`, `eval_perplexity` (None where there is
        none, NaN for a run whose loss was not finite), `best`: `pandas.DataFrame(result.rows)`."""
        best = self.best
        return [
            {"run": run.name, **run.values}
            | {name: math.nan if run.failed and name == "final_loss" else run.summary.get(name) for name in _SCORES}
            | {"best": run is best}
            for run in self.runs
        ]

    def csv(self) -> str:
        """`rows` as CSV, with empty cells for None."""
        text = io.StringIO()
        rows = self.rows
        heads = list(dict.fromkeys(name for row in rows for name in row if name not in ("best", *_SCORES)))
        writer = csv.DictWriter(text, [*heads, *_SCORES, "best"], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})
        return text.getvalue()

    def table(self) -> str:
        """`rows` for people: the best is marked with a star, and a run that did not end says why."""
        heads = ("", "run", "final loss", "eval loss", "perplexity", "")
        lines = []
        for run, row in zip(self.runs, self.rows, strict=True):
            numbers = ["-" if row[name] is None else f"{row[name]:.4f}" for name in _SCORES]
            why = run.failed or ("" if run.summary else "not ended")
            lines.append(("*" if row["best"] else "", run.name, *numbers, why))
        return as_text(table(heads, lines, words=(0, 1, 5)))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the losses of the runs against the swept number, the best one marked.

        Args:
            path: where to write the picture, if anywhere; the ending says the format.

        Returns:
            A `matplotlib.figure.Figure`, which a notebook shows.

        Raises:
            InputError: matplotlib isn't installed.
        """
        return draw(self.runs, self.best, path)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else shown(value)
