"""The written conclusion of a study: its setting, a table of its arms, what follows, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mora_jax.studies.results import Results
from mora_jax.studies.study import Sources


def write_conclusion(results: Results, preset: str, sources: Sources, figures: Sequence[str]) -> str:
    """The whole text, in Markdown.

    Args:
        results: what it is about.
        preset: the size.
        sources: base model and data.
        figures: names of those that lie beside it.
    """
    study = results.study
    parts = [f"# {study.name}: {study.question}", f"After {study.paper}. {_setting(results, preset, sources)}"]
    if results.frame["value"].notna().any():
        parts += study.conclude(results)
    if figures:
        parts.append("## Figures\n\n" + "\n\n".join(f"![{name}](figures/{name}.png)" for name in figures))
    notes = [*study.notes, *_edges(results)]
    if notes:
        parts.append("## Limits\n\n" + "\n".join(f"- {note}" for note in notes))
    missing = results.missing()
    if missing:
        lines = "\n".join(f"- {cell}: {why}" for cell, why in missing)
        parts.append(f"## Missing\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def _setting(results: Results, preset: str, sources: Sources) -> str:
    frame = results.frame
    versions = next(iter(frame["versions"]), "")
    seeds = results.preset.seeds
    at = " at its best evaluation" if results.study.chosen_at_best else ""
    return (
        f"Preset {preset}: {results.preset.doc}. Base model: {Path(sources.model).name}. {seeds} seeds; each arm's "
        f"learning rate was chosen on another seed, by {results.study.chosen_by.replace('_', ' ')}{at}. Intervals are "
        "of 95 %, by Student's t over seeds, differences in pairs by seed; several comparisons are made, and none of "
        f"the intervals is widened for that. ({versions})"
    )


def _edges(results: Results) -> Iterable[str]:
    at = [
        f"{arm}{f' ({level})' if level else ''}"
        for level in results.levels
        for arm in results.arms_at(level)
        if results.at_edge(arm, level)
    ]
    if at:
        yield (
            f"The best rate is the lowest or highest that was tried, so a better one may lie outside: {', '.join(at)}."
        )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are set to the right."""
    rules = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rules, *rows))


def arms_table(results: Results, metrics: dict[str, str], level: str = "", digits: int = 3) -> str:
    """A row an arm: parameters, chosen rate, and the means of metrics over seeds.

    Args:
        results: of the study.
        metrics: the heads of columns by metric.
        level: of the study.
        digits: after the decimal point.
    """
    rows = []
    for arm in results.arms_at(level):
        count, rate = results.parameters(arm), results.rate(arm, level)
        means = [results.mean(metric, arm, level).text(digits) for metric in metrics]
        rows.append([arm, f"{count:,}" if count else "missing", f"{rate:g}" if rate else "missing", *means])
    return table(["arm", "trained parameters", "learning rate", *metrics.values()], rows)
