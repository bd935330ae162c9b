"""The demo's picture: validation loss over the training, and what was gained and forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mora_jax.demo.cells import MODES, Curve
from mora_jax.demo.table import Row
from mora_jax.display.figures import new_figure, style
from mora_jax.paths import new_file


def draw(rows: Sequence[Row], curves: Mapping[tuple[str, str], Curve], path: Path) -> None:
    """Writes the picture as PNG.

    Args:
      rows: the table's lines, the base model first.
      curves: by (method, loss mode).
      path: where to.
    """
    from matplotlib.lines import Line2D

    figure = new_figure(13, 5.2)
    panels = figure.subplots(1, 3)
    methods = list(dict.fromkeys(row.method for row in rows if row.before))
    styles = {method: style(number) for number, method in enumerate(methods)}
    low = min(min(curve.held_out_loss) for curve in curves.values())
    high = max(max(curve.held_out_loss) for curve in curves.values())
    for panel, mode in zip(panels[:2], MODES, strict=True):
        _draw_curves(panel, mode, curves, styles)
        panel.set_ylim(low / 1.2, high * 1.2)
        _plain_ticks(panel.yaxis)
    _draw_trade(panels[2], rows, styles)
    handles = [Line2D([], [], **styles[method], label=method) for method in methods]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    with new_file(path) as file:
        figure.savefig(file, dpi=130)


def _plain_ticks(axis: Any) -> None:
    """Writes a logarithmic axis in plain numbers, at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _draw_curves(panel: Any, mode: str, curves: Mapping[tuple[str, str], Curve], styles: Mapping[str, Any]) -> None:
    for (method, curve_mode), curve in curves.items():
        if curve_mode == mode:
            panel.plot(curve.steps, curve.held_out_loss, **styles[method], markersize=5)
    panel.set_yscale("log")
    panel.set_title(f"Trained with {mode} loss")
    panel.set_xlabel("optimiser step")
    panel.set_ylabel("validation loss on answers (nats a token)")
    panel.grid(alpha=0.3)


def _draw_trade(panel: Any, rows: Sequence[Row], styles: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D

    base = rows[0].scores
    panel.axvline(base.base_perplexity, color="0.6", linewidth=1, zorder=0)
    panel.plot(base.base_perplexity, 100 * base.exact_match, "*", color="#CC79A7", markersize=15)
    for row in rows[1:]:
        colour, marker = styles[row.method]["color"], styles[row.method]["marker"]
        panel.plot(
            row.scores.base_perplexity,
            100 * row.scores.exact_match,
            marker=marker,
            markersize=9,
            linestyle="none",
            color=colour,
            markerfacecolor=colour if row.mode == "masked" else "white",
            markeredgewidth=1.6,
        )
    panel.set_xscale("log")
    _plain_ticks(panel.xaxis)
    panel.set_ylim(-4, 104)
    panel.set_title("Learned against forgotten")
    panel.set_xlabel("perplexity of base text (grey line: before fine-tuning)")
    panel.set_ylabel("exact match on test questions (%)")
    panel.grid(alpha=0.3)
    kinds = (
        ("*", "#CC79A7", "#CC79A7", "base model"),
        ("o", "0.3", "0.3", "filled: masked loss"),
        ("o", "0.3", "white", "hollow: unmasked loss"),
    )
    handles = [
        Line2D([], [], linestyle="none", marker=m, color=c, markerfacecolor=f, markersize=8, label=text)
        for m, c, f, text in kinds
    ]
    panel.legend(handles=handles, frameon=False, fontsize=9, loc="best")
