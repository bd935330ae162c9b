"""The written conclusion of a study: its template filled with tables, and what is missing."""

import importlib.resources
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from mora_jax.studies.claims import Claim
from mora_jax.studies.intervals import interval
from mora_jax.studies.results import Results
from mora_jax.studies.study import CHOOSING_SEEDS, Metric, Sources


def write_conclusion(
    results: Results, stated: Sequence[Claim], preset: str, sources: Sources, figures: Iterable[str]
) -> str:
    """The whole text, in Markdown.

    Args:
        results: what it is about.
        stated: its claims.
        preset: the size.
        sources: base model and data.
        figures: names of those that lie beside it.
    """
    study = results.study
    parts = [f"# {study.name}: {study.question}", f"After {study.paper}. {_setting(results, preset, sources)}"]
    if results.frame["value"].notna().any():
        text = importlib.resources.files("mora_jax.studies").joinpath(f"text/{study.name}.md").read_text("utf-8")
        arms = "\n\n".join(_titled(level, arms_table(results, study.metrics, level)) for level in results.levels)
        sections = study.sections(results)
        parts.append(Template(text).substitute(sections, arms=arms, differences=claims_text(stated)).strip())
        parts.append(f"## By learning rate\n\nOn the seeds that choose, after the last step:\n\n{rates_table(results)}")
    if pictures := "\n\n".join(f"![{name}](figures/{name}.png)" for name in figures):
        parts.append(f"## Figures\n\n{pictures}")
    parts.append("## Limits\n\n" + _bullets([*study.notes, *_edges(results)]))
    if missing := results.missing():
        parts.append("## Missing\n\n" + _bullets(f"{cell}: {why}" for cell, why in missing))
    return "\n\n".join(parts) + "\n"


def _setting(results: Results, preset: str, sources: Sources) -> str:
    study, sizes = results.study, results.preset
    versions = next(iter(results.frame["versions"]), "")
    at = " at its best evaluation" if study.chosen_at_best else ""
    reason = f" {sizes.reason}" if sizes.reason else ""
    return (
        f"Preset {preset}: {sizes.doc}.{reason} Base model: {Path(sources.model).name}. {sizes.seeds} seeds are "
        f"reported. Each arm's learning rate has the best mean {study.chosen_by.replace('_', ' ')}{at} over "
        f"{len(CHOOSING_SEEDS)} other seeds, on a grid that grows until the best lies inside. Intervals are of 95 %, "
        f"by Student's t over seeds, differences in pairs by seed. ({versions})"
    )


def rates_table(results: Results) -> str:
    """What the seeds that choose came to after the last step, at every rate that was tried."""
    names = {results.study.chosen_by, *(metric.name for metric in results.study.metrics)}
    measured = [name for name in sorted(names) if any(results.by_rate(name, *pair) for pair in results.pairs())]
    rows = []
    for arm, level in results.pairs():
        for rate, curves in results.by_rate(results.study.chosen_by, arm, level).items():
            values = [results.by_rate(name, arm, level).get(rate, {}).values() for name in measured]
            means = [interval(curve[-1][1] for curve in curves).text() for curves in values]
            chosen = " (chosen)" if rate == results.rate(arm, level) else ""
            rows.append([f"{arm}{f', {level}' if level else ''}, {rate:g}{chosen}", str(len(curves)), *means])
    return table(["arm, rate", "n", *(name.replace("_", " ") for name in measured)], rows)


def claims_text(stated: Sequence[Claim]) -> str:
    """The claims metric by metric, with what they could have shown."""
    heads = ["difference", "effect", "n", "p", "verdict", "detectable", "at half the steps", "robust"]
    by_metric: dict[str, list[list[str]]] = {}
    for claim in stated:
        row = [
            claim.claim + (f", {claim.level}" if claim.level else ""),
            claim.effect_text(),
            f"{claim.n} ({claim.diverged} diverged)" if claim.diverged else str(claim.n),
            "" if claim.p is None else f"{claim.p:.2g}",
            claim.verdict,
            "" if claim.detectable is None else f"{claim.detectable:.3f}",
            "" if claim.halfway is None else f"{claim.halfway:+.3f}",
            "not run" if claim.robust is None else "yes" if claim.robust else "no",
        ]
        by_metric.setdefault(claim.metric, []).append(row)
    decided = sum(claim.decided for claim in stated)
    return (
        f"The first minus the second, in pairs by seed. *p* is corrected by Holm's method: among the differences in "
        f"{stated[0].metric if stated else 'the first metric'}, which the question is about, and among all others. "
        f"Of {len(stated)} differences {decided} are decided (p below 0.05). *Detectable* is the difference that a "
        "study of as many seeds and this spread would have shown in four of five cases, uncorrected; *robust* says "
        "whether the same came out from weights with noise of one bfloat16 step.\n\n"
    ) + "\n\n".join(_titled(metric, table(heads, rows)) for metric, rows in by_metric.items())


def _edges(results: Results) -> Iterable[str]:
    at = [f"{arm}{f' ({level})' if level else ''}" for arm, level in results.pairs() if results.at_edge(arm, level)]
    if at:
        yield f"At the edge of the rates that were tried, so that comparisons are void: {', '.join(at)}."


def _titled(title: str, text: str) -> str:
    return f"### {title}\n\n{text}" if title else text


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are set to the right."""
    rules = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rules, *rows))


def arms_table(results: Results, metrics: Sequence[Metric], level: str = "") -> str:
    """A row an arm: parameters, chosen rate, seeds, and the means of metrics over seeds."""
    metrics = [metric for metric in metrics if results.has(metric.name)]
    rows = []
    for arm in results.arms_at(level):
        count, rate = results.parameters(arm), results.rate(arm, level)
        means = [results.mean(metric, arm, level) for metric in metrics]
        seeds = means[0].seeds if means else "0"
        numbers = [f"{count:,}" if count else "missing", f"{rate:g}" if rate else "missing", seeds]
        rows.append([arm, *numbers, *(mean.text() for mean in means)])
    return table(["arm", "trained parameters", "learning rate", "n", *(metric.head for metric in metrics)], rows)
