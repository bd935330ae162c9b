"""The conclusion of the study of the loss over instructions."""

from __future__ import annotations

import math

from mora_jax.studies.conclusion import table
from mora_jax.studies.instruct.compare import (
    GUIDE,
    LOSS,
    all_rows,
    at_rows,
    change,
    gain,
    losses,
    methods,
    ratio,
)
from mora_jax.studies.intervals import Interval, interval, verdict
from mora_jax.studies.results import Results

_COLUMNS = {
    "trained_rows_loss": "rows trained on",
    "instruction_loss": "instructions",
    "base_text_loss": "base texts",
    "exact_match": "exact match",
    "f1": "F1",
}


def conclude(results: Results) -> list[str]:
    """The paragraphs."""
    epochs = _epochs(results)
    return [
        "Losses are in nats a token of the answers (and their ends) unless a column says otherwise. *Best* is each "
        "arm's epoch (of 1, 2, 4, 8 …) with the lowest validation loss, scored on the test; *last* is after "
        f"{epochs} epochs. A gain is the loss of the first arm minus that of the second, in pairs by seed.",
        _levels(results),
        f"## Against masked loss\n\n{_counted(results)}\n\n"
        + table(
            [
                "level",
                "method",
                "loss",
                "gain at best",
                "verdict",
                "gain at last",
                "verdict",
                "gain on base texts at last",
            ],
            [row for level in results.levels for row in _against(results, level)],
        ),
        *_controls(results),
        *_trends(results),
        "## All arms\n\n" + "\n\n".join(f"### {level}\n\n{_arms(results, level)}" for level in results.levels),
    ]


def _epochs(results: Results) -> int:
    settings = results.preset.levels[0].settings
    return int(settings["train.steps"] // settings["train.eval_every"])


def _levels(results: Results) -> str:
    """What the rows of each level are like, and what the base scores on them."""
    rows, repeated = [], 0.0
    for level in results.preset.levels:
        arm = results.arms_at(level.name)[0]
        share = results.mean("share", arm, level.name)
        before = interval(curve[0][1] for curve in results.curves(LOSS, arm, level.name).values())
        duplicates = results.mean("duplicate_prompts", arm, level.name)
        repeated = repeated if math.isnan(duplicates.mean) else duplicates.mean
        rows.append([level.name, f"{ratio(results, level.name):.2f}", f"{share.mean:.2f}", _mean(before)])
    heads = ["level", "instruction tokens an answer token", "mean share of the answer", "test loss of the base"]
    return (
        f"{table(heads, rows)}\n\nOf all rows {repeated:.1%} repeat the prompt of another. No prompt is in two of the "
        "parts for training, validation and test."
    )


def _mean(one: Interval) -> str:
    return "missing" if math.isnan(one.mean) else f"{one.mean:.3f}"


def _against(results: Results, level: str) -> list[list[str]]:
    rows = []
    for method in methods(results):
        for loss in losses(results, method, level):
            arms = f"{method} masked", f"{method} {loss}"
            best, last = (gain(results, *arms, level, best=one) for one in (True, False))
            texts = results.difference("base_text_loss", *arms, level)
            rows.append(
                [
                    level,
                    method,
                    loss,
                    best.text(sign=True),
                    _verdict(best),
                    last.text(sign=True),
                    _verdict(last),
                    texts.text(sign=True),
                ]
            )
    return rows


def _counted(results: Results) -> str:
    """How often unmasked loss is better, at best epochs."""
    found = [
        _verdict(gain(results, f"{method} masked", f"{method} unmasked", level))
        for level in results.levels
        for method in methods(results)
        if "unmasked" in losses(results, method, level)
    ]
    return (
        f"Of {len(found)} pairs of a level and a method, unmasked loss is better in {found.count('better')} and worse "
        f"in {found.count('worse')}, at best epochs; in the others no difference is shown."
    )


def _verdict(one: Interval) -> str:
    return verdict(one, "better", "worse")


def _controls(results: Results) -> list[str]:
    """Whether what unmasked loss does is the smaller weight of the answer."""
    lines = []
    for level in results.levels:
        for method in methods(results):
            for control in ("share", "lr_share"):
                if not {control, "unmasked"} <= set(losses(results, method, level)):
                    continue
                masked, weighed, unmasked = (f"{method} {loss}" for loss in ("masked", control, "unmasked"))
                weight, rest = gain(results, masked, weighed, level), gain(results, weighed, unmasked, level)
                lines.append(
                    f"- {level}, {method}: the smaller weight alone (`{control}`) is {_said(weight)} than masked loss; "
                    f"with the instruction beside it, unmasked loss is {_said(rest)} than `{control}`."
                )
    if not lines:
        return []
    return [
        "## The control\n\n`share` is masked loss in which each row counts by the share that its answer has under "
        "unmasked loss; `lr_share` is masked loss at its own rate times the mean share. At best epochs:\n\n"
        + "\n".join(lines)
    ]


def _said(one: Interval) -> str:
    words = _verdict(one)
    said = "not shown to be better or worse" if words == "no difference shown" else words
    return f"{said} ({one.text(sign=True)})"


def _trends(results: Results) -> list[str]:
    """How the gain of unmasked loss goes with the ratio, and with the number of rows."""
    lines = []
    for method in methods(results):
        arms = f"{method} masked", f"{method} unmasked"
        for rows in all_rows(results):
            names = [level.name for level in at_rows(results, rows) if arms[1] in results.arms_at(level.name)]
            if len(names) > 1:
                low, high = (ratio(results, name) for name in (names[0], names[-1]))
                found = change(results, *arms, names[0], names[-1])
                words = verdict(found, "it grows with the ratio", "it falls with the ratio")
                lines.append(
                    f"- {method}, {rows} rows, ratio {low:.1f} to {high:.1f}: {words}, {found.text(sign=True)}."
                )
        counts = all_rows(results)
        for few, many in zip(at_rows(results, counts[0]), at_rows(results, counts[-1]), strict=True):
            if few is many or any(arms[1] not in results.arms_at(one.name) for one in (few, many)):
                continue
            found = change(results, *arms, few.name, many.name)
            words = verdict(found, "it grows with the rows", "it falls with the rows")
            lines.append(
                f"- {method}, ratio {ratio(results, few.name):.1f}, {counts[0]} to {counts[-1]} rows: {words}, "
                f"{found.text(sign=True)}."
            )
    if not lines:
        return []
    return [
        "## The gain of unmasked loss against the ratio and the rows\n\nThe paper's fits have it grow with the ratio "
        "(from about 0.25 on) and fall with the rows (at ratio 10 to nothing near 58,000). Here, the change of the "
        "gain at best epochs:\n\n" + "\n".join(lines)
    ]


def _arms(results: Results, level: str) -> str:
    """A row an arm: its rate, its losses at the best and the last epoch, and answers."""
    shown = {name: head for name, head in _COLUMNS.items() if (results.frame["metric"] == name).any()}
    rows = []
    for arm in results.arms_at(level):
        rate = results.rate(arm, level)
        best = interval(results.best(LOSS, GUIDE, arm, level).values())
        found = [best, results.mean(LOSS, arm, level), *(results.mean(name, arm, level) for name in shown)]
        rows.append([arm, f"{rate:g}" if rate else "missing", *(one.text() for one in found)])
    heads = ["arm", "learning rate", "test, best epoch", "test, last epoch"]
    return table([*heads, *(f"{head}, last" for head in shown.values())], rows)
