"""The losses of runs against their steps, as one drawing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from mora_jax.errors import InputError
from mora_jax.report.runs import Run
from mora_jax.sweeps.plot import STYLES

# Losses of single batches are noisy: a curve is their mean over this share of the run.
_SMOOTHED = 1 / 25
# More runs than this share a legend beside the drawing.
_IN_DRAWING = 6


def draw_curves(runs: Sequence[Run]) -> Any:
    """Draws training and evaluation losses, a line a run.

    Args:
        runs: those with something to draw.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        InputError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        raise InputError("curves need matplotlib: pip install 'mora-jax[plots]'") from None
    evaluations = [[row for row in run.evaluations if row.get("eval_loss") is not None] for run in runs]
    scored = any(evaluations)
    figure = Figure(figsize=(10.5 if scored else 6.5, 4), layout="constrained")
    panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    lines = []
    for number, run in enumerate(runs):
        colour, dash, marker = style_of(number)
        steps, losses = [row["step"] for row in run.steps], [row["loss"] for row in run.steps]
        drawn = panels[0].plot(steps, smoothed(losses), color=colour, linestyle=dash, label=run.name)
        lines += drawn
        if scored:
            rows = evaluations[number]
            steps, losses = [row["step"] for row in rows], [row["eval_loss"] for row in rows]
            panels[1].plot(steps, losses, color=colour, linestyle=dash, marker=marker, label=run.name)
    mean = any(len(run.steps) * _SMOOTHED > 1 for run in runs)
    words = ["training loss, nats a token" + (", running mean" if mean else ""), "held-out loss, nats a token"]
    for axes, label in zip(panels, words, strict=False):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if len(runs) > _IN_DRAWING:
        figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=8)
    elif len(runs) > 1:
        panels[0].legend(frameon=False, fontsize=9)
    return figure


def style_of(number: int) -> tuple[str, Any, str]:
    """Colour, dash and marker of the run with this number: those of neighbours differ in all three, no pair is the same
    in both colour and dash before the sixteenth."""
    turn, place = divmod(number, len(STYLES))
    dash, marker = STYLES[(place + turn) % len(STYLES)][1:]
    return STYLES[place][0], dash, marker


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, over a twenty-fifth of all of them."""
    window = max(1, round(len(losses) * _SMOOTHED))
    return [sum(part) / len(part) for part in (losses[max(0, i + 1 - window) : i + 1] for i in range(len(losses)))]


def as_svg(figure: Any) -> str:
    """A figure as the text of an `<svg>` element; equal figures give equal texts."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mora-jax", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
