"""A report of runs as one web page without scripts, which needs nothing beside it: tables, curves, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mora_jax.display.figures import as_svg, legend, new_figure, style
from mora_jax.display.pages import page_template
from mora_jax.report.answers import Question
from mora_jax.report.runs import Run
from mora_jax.report.table import difference_table, result_table

# Losses of single batches are noisy: a curve is their mean over this share of the run.
_SMOOTHED = 1 / 25
# More runs than this share a legend beside the drawing.
_IN_DRAWING = 6


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
        results=(results.heads, results.rows),
        notes=results.notes,
        curves=as_svg(draw_curves(drawn)) if drawn else "",
        differences=difference_table(runs),
        questions=questions,
        silent=silent or {},
        max_new_tokens=max_new_tokens,
    )


def draw_curves(runs: Sequence[Run]) -> Any:
    """Draws training and evaluation losses against steps, a line a run.

    Args:
        runs: those with something to draw.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        InputError: matplotlib isn't installed.
    """
    evaluations = [[row for row in run.evaluations if row.get("eval_loss") is not None] for run in runs]
    scored = any(evaluations)
    figure = new_figure(10.5 if scored else 6.5, 4)
    panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    lines = {}
    for number, run in enumerate(runs):
        steps, losses = [row["step"] for row in run.steps], [row["loss"] for row in run.steps]
        [lines[run.name]] = panels[0].plot(steps, smoothed(losses), **style(number) | {"marker": ""})
        if scored:
            rows = evaluations[number]
            panels[1].plot([row["step"] for row in rows], [row["eval_loss"] for row in rows], **style(number))
    mean = ", running mean" if any(len(run.steps) * _SMOOTHED > 1 for run in runs) else ""
    labels = (f"training loss, nats a token{mean}", "held-out loss, nats a token")
    for axes, label in zip(panels, labels, strict=False):
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if len(runs) > _IN_DRAWING:
        legend(figure, lines, loc="outside right upper", fontsize=8)
    elif len(runs) > 1:
        legend(panels[0], lines, fontsize=9)
    return figure


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, over a twenty-fifth of all of them."""
    window = max(1, round(len(losses) * _SMOOTHED))
    return [sum(part) / len(part) for part in (losses[max(0, i + 1 - window) : i + 1] for i in range(len(losses)))]
