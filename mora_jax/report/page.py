"""A report of runs as one web page without scripts, which needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mora_jax.data.inspect.page import page_template
from mora_jax.report.answers import Question
from mora_jax.report.curves import as_svg, draw_curves
from mora_jax.report.runs import Run
from mora_jax.report.table import STAR, difference_table, result_table


def report_page(
    runs: Sequence[Run],
    questions: Sequence[Question] = (),
    silent: Mapping[str, str] | None = None,
    max_new_tokens: int = 0,
) -> str:
    """The page.

    Args:
        runs: at least one.
        questions: with their answers.
        silent: why a run has no answers, by its name.
        max_new_tokens: the longest answer.

    Returns:
        HTML. Whatever comes from the runs is escaped.

    Raises:
        InputError: matplotlib isn't installed.
    """
    results = result_table(runs)
    drawn = [run for run in runs if run.steps or run.evaluations]
    return page_template("report.html.jinja", Path(__file__).parent).render(
        runs=runs,
        results=results,
        starred=any(cell.endswith(STAR) for row in results[1] for cell in row[1:-1]),
        curves=as_svg(draw_curves(drawn)) if drawn else "",
        differences=difference_table(runs),
        questions=questions,
        silent=silent or {},
        max_new_tokens=max_new_tokens,
    )
