"""A report of runs: what came of them and which settings differ as tables of texts, and all of it as a web page.

The page has no scripts and needs nothing beside it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mora_jax.display.figures import as_svg, legend, new_figure, style
from mora_jax.display.pages import page_template
from mora_jax.report.answers import Question
from mora_jax.report.runs import COMPARED, Run, differences, evaluated_alike

#: Marks the lowest evaluation loss.
STAR = " *"
# What the name of a value's standard error ends with.
_ERROR = "_stderr"


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
    names.sort(key=lambda name: list(COMPARED).index(name) if name in COMPARED else len(COMPARED))
    names = [name for name in names if any(result.get(name) is not None for result in results)]
    names = [name for name in names if name.removesuffix(_ERROR) not in names or not name.endswith(_ERROR)]
    scored = [run for run, result in zip(runs, results, strict=True) if result.get("eval_loss") is not None]
    best, notes = None, []
    if len(scored) > 1 and evaluated_alike(scored):
        best = min(result["eval_loss"] for result in results if result.get("eval_loss") is not None)
        notes.append(f"{STAR.strip()} the lowest evaluation loss")
    elif len(scored) > 1:
        notes.append("the evaluation losses are of different data or objectives: they don't compare")
    if any(result.get("resumed_after") for result in results):
        notes.append("of a resumed run tokens/s and time are those of its last process, after that step")
    rows = []
    for run, result in zip(runs, results, strict=True):
        cells = [_cell(name, result.get(name), result.get(name + _ERROR)) for name in names]
        if best is not None and result.get("eval_loss") == best:
            cells[names.index("eval_loss")] += STAR
        rows.append([run.name, *cells, run.state])
    heads = ["run", *(_head(name) for name in names), "state"]
    if all(run.summary for run in runs):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return ResultTable(heads, rows, notes)


def _head(name: str) -> str:
    return COMPARED[name][0] if name in COMPARED else name.removeprefix("eval_").replace("_", " ")


def _cell(name: str, value: Any, error: float | None) -> str:
    if value is None:
        return "-"
    text = COMPARED[name][1](value) if name in COMPARED else f"{value:.4g}"
    return text if error is None else f"{text} ± {error:.2g}"


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
    unit = "" if any(run.config.loss.preference for run in runs) else ", nats a token"
    labels = (f"training loss{unit}{mean}", f"held-out loss{unit}")
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
