"""How studies draw: a method has one colour and mark in all figures, seeds a band, and a caption says what is shown."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from mora_jax.display import figures as display
from mora_jax.display.figures import plain_log as plain_log
from mora_jax.studies.intervals import Interval, interval
from mora_jax.studies.results import Results

# Okabe and Ito's colours, as in the demo's picture. The first name that an arm's begins with counts.
METHODS = {
    "full": ("#000000", "D"),
    "LoRA+": ("#8C6D1F", "X"),
    "LoRA": ("#0072B2", "o"),
    "MoRA sharing": ("#D55E00", "s"),
    "MoRA": ("#009E73", "^"),
    "HiRA": ("#CC79A7", "v"),
    "DoRA": ("#56B4E9", "P"),
    "PiSSA": ("#E69F00", "*"),
}
FILLINGS = ("full", "none", "left", "top", "bottom")
DASHES = ("-", (0, (5, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (8, 2, 1, 2)))
#: Inches of a column of the documentation, 700 pixels wide.
WIDTH = 7.0
#: Styles of a line that helps to read: zero, chance, a bound.
ZERO = {"color": "0.5", "linewidth": 1, "zorder": 0}
DOTTED = ZERO | {"linestyle": ":"}


def style(arm: str, arms: Sequence[str] = ()) -> dict[str, Any]:
    """Colour and mark of an arm's method; its dash and filling tell it from other arms of the method.

    Args:
        arm: its name.
        arms: those in the figure.
    """

    def method(name: str) -> str:
        return next((known for known in METHODS if name.startswith(known)), "")

    colour, mark = METHODS.get(method(arm), ("#777777", "."))
    place = [name for name in arms if method(name) == method(arm)].index(arm) if arm in arms else 0
    look = {"color": colour, "marker": mark, "linestyle": DASHES[place % len(DASHES)], "markersize": 4.5}
    return look | {"fillstyle": FILLINGS[place % len(FILLINGS)], "markerfacecoloralt": "white"}


def new_figure(columns: int = 1, rows: int = 1, *, height: float = 3.0) -> tuple[Any, list[Any]]:
    """A figure as wide as a column and its panels, row by row; `height` is a panel's, in inches.

    Raises:
        InputError: matplotlib isn't installed.
    """
    figure = display.new_figure(WIDTH, height * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
        panel.xaxis.label.set_size(9)
        panel.yaxis.label.set_size(9)
    return figure, panels


def finish(figure: Any, results: Results, text: str, *, columns: int = 3) -> Any:
    """Takes empty panels away, puts one legend of all above them and a caption below, and returns the figure.

    Args:
        figure: which.
        results: that it shows, whose base model's seeds the caption names.
        text: what is shown, and what bands and bars mean.
        columns: of the legend.
    """
    entries: dict[str, Any] = {}
    for panel in figure.axes:
        if not panel.has_data():  # of a grid with more places than levels
            panel.remove()
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    caption = "\n".join(textwrap.wrap(f"{results.study.name}: n = {results.preset.seeds} seeds. {text}", 105))
    figure.supxlabel(caption, fontsize=8, x=0.01, ha="left")
    if entries:
        columns = min(columns, len(entries))
        # Room for the legend is made by a height of its own, so that it lies over no panel.
        lines = math.ceil(len(entries) / columns)
        figure.set_figheight(figure.get_figheight() + 0.2 * lines + 0.15 * caption.count("\n"))
        place = {"loc": "outside upper center", "ncols": columns, "frameon": False, "fontsize": 8}
        figure.legend(entries.values(), entries.keys(), **place)
    return figure


def draw_means(panel: Any, places: Sequence[float], means: Sequence[Interval], label: str, **look: Any) -> None:
    """Means over seeds with bars of their 95 % intervals, at places along the horizontal axis."""
    bars = [mean.half or 0.0 for mean in means]
    panel.errorbar(places, [mean.mean for mean in means], bars, capsize=3, label=label, **look)


def draw_curves(
    panel: Any,
    results: Results,
    metric: str,
    level: str = "",
    arms: Iterable[str] = (),
    *,
    label: str = "{}",
    epoch: float = 0.0,
    **look: Any,
) -> None:
    """A metric against steps: a line an arm through the means over seeds, a band of their 95 % intervals.

    Args:
        panel: to draw in.
        results, metric, level: what.
        arms: of which; all of the level by default.
        label: of an arm in the legend, around its name.
        epoch: steps of one, to draw against epochs behind the first step; 0 for steps.
        look: changes of each arm's style.
    """
    arms = list(arms) or results.arms_at(level)
    for arm in arms:
        means = {step: mean for step, mean in results.by_step(metric, arm, level).items() if step or not epoch}
        if not means:
            continue
        steps = [step / (epoch or 1) for step in means]
        lines = style(arm, arms) | {"markevery": max(1, len(steps) // 8)} | look
        panel.plot(steps, [mean.mean for mean in means.values()], label=label.format(arm), **lines)
        if all(mean.half is not None for mean in means.values()):
            low, high = ([getattr(mean, end) for mean in means.values()] for end in ("low", "high"))
            panel.fill_between(steps, low, high, color=lines["color"], alpha=0.12, linewidth=0)
    panel.set_xlabel("epoch" if epoch else "step")


def rates_figure(results: Results) -> Any:
    """What rates were chosen by against the rate, a panel a level: means over the seeds that choose."""
    study, columns = results.study, min(2, len(results.levels))
    figure, panels = new_figure(columns, -(-len(results.levels) // columns))
    best = max if study.higher else min
    for panel, level in zip(panels, results.levels, strict=False):
        for arm in results.arms_at(level):
            means = {}
            for rate, curves in results.by_rate(study.chosen_by, arm, level).items():
                values = [[value for _, value in curve] for curve in curves.values()]
                means[rate] = interval(best(one) if study.chosen_at_best else one[-1] for one in values).mean
            if means:
                panel.plot(means.keys(), means.values(), label=arm, **style(arm, results.arms))
            chosen = results.rate(arm, level) or math.nan
            if chosen in means:
                look = {"color": "white", "markeredgecolor": style(arm)["color"], "markersize": 12, "zorder": 5}
                panel.plot(chosen, means[chosen], "*", **look)
        plain_log(panel, "x", (1.0, 3.0))
        if not study.higher:
            plain_log(panel, "y", (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
        panel.set_title(level, fontsize=8)
        panel.set(xlabel="learning rate", ylabel=study.chosen_by.replace("_", " "))
    return finish(figure, results, "Means over the seeds that choose; star: the chosen rate.")
