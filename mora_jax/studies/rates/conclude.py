"""The conclusion of the study, from its table alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mora_jax.studies.conclusion import arms_table, table
from mora_jax.studies.intervals import Interval, paired, verdict
from mora_jax.studies.rates.minima import factor
from mora_jax.studies.rates.readings import (
    FULL,
    VARIANTS,
    against,
    beside,
    capacity,
    grid,
    large_batch,
    position,
    ratio,
    row_levels,
    sweep_level,
    tokens,
)
from mora_jax.studies.results import Results


def conclude(results: Results) -> list[str]:
    """The paragraphs: best rates, what another's rate costs, variants, capacity, batch size."""
    level = sweep_level(results)
    settings = results.preset.settings
    parts = [
        f"Losses are in nats a token of the answers, on rows for reporting alone. {level} are seen once, in "
        f"{settings['train.steps']} steps of {settings['train.batch_size']}, at a constant rate. LoRA and its variants "
        "have alpha 32 at every rank; MoRA has no alpha.",
        "## Where the loss is lowest\n\n"
        "*Best rate*: the lowest point of a parabola in the logarithm of the rate through the chosen rate and the two "
        "beside it, on each reported seed; in brackets the interval over the seeds that have one. The other columns "
        "are what the loss is higher at the next rates that were tried, about a factor of three away.\n\n"
        + _minima(results, level),
        "\n".join(_ratios(results, level)),
        "## At another arm's rate\n\n"
        "How much higher an arm's loss is at the rates that others chose than at its own, on the seed that chooses; "
        "empty where it wasn't tried.\n\n" + _matrix(results, level),
    ]
    if VARIANTS in results.levels:
        parts.append("## Variants, each at its best rate\n\n" + _variants(results, level))
    if len(row_levels(results)) > 1:
        parts.append("## Capacity\n\n" + _capacity(results))
    if (large := large_batch(results)) is not None:
        parts.append("## Batch size\n\n" + _batches(results, level, large))
    return parts


def _minima(results: Results, level: str) -> str:
    rows = []
    for arm in results.arms_at(level):
        count, rate, found = results.parameters(arm), results.rate(arm, level), position(results, arm, level)
        seeds = "" if found.n == results.preset.seeds else f", {found.n} of {results.preset.seeds} seeds"
        costs = [beside(results, arm, level, above=above) for above in (False, True)]
        rows.append(
            [
                arm,
                f"{count:,}" if count else "missing",
                f"{rate:g}" if rate else "missing",
                f"{factor(found)}{seeds}",
                results.mean("loss", arm, level).text(),
                *("not tried" if cost is None else cost[1].text(sign=True) for cost in costs),
            ]
        )
    heads = ["arm", "trained parameters", "chosen rate", "best rate", "loss", "at the rate below", "at the rate above"]
    return table(heads, rows)


def _ratios(results: Results, level: str) -> Iterable[str]:
    arms = results.arms_at(level)
    loras = [arm for arm in arms if arm.startswith("LoRA")]
    moras = [arm for arm in arms if arm.startswith("MoRA")]
    yield "Best rates against each other, paired by seed:\n"
    pairs = [(arm, FULL) for arm in loras + moras if FULL in arms]
    pairs += [(arm, lora) for arm in moras for lora in loras if lora.split()[1:] == arm.split()[2:]]
    for arm, other in pairs:
        found = ratio(results, arm, other, level)
        same = "" if found.n < 2 or found.decided else "; no difference shown"
        yield f"- {arm} over {other}: {factor(found)}{same}"


def _matrix(results: Results, level: str) -> str:
    arms = results.arms_at(level)
    chosen = sorted({rate for arm in arms if (rate := results.rate(arm, level)) is not None})
    rows = []
    for arm in arms:
        losses, own = grid(results, "loss", arm, level), results.rate(arm, level)
        here = math.nan if own is None else losses.get(own, math.nan)
        costs = [losses.get(rate, math.nan) - here for rate in chosen]
        rows.append([arm, *("" if math.isnan(cost) else f"{cost:+.3f}" for cost in costs)])
    return table(["arm", *(f"{rate:g}" for rate in chosen)], rows)


def _variants(results: Results, level: str) -> str:
    base = _of_rank(results, level)
    lines = [arms_table(results, {"loss": "loss"}, VARIANTS), ""]
    same = [arm for arm in results.arms_at(level) if arm.startswith("MoRA") and arm.split()[-1] == base.split()[-1]]
    for arm, there in [(arm, VARIANTS) for arm in results.arms_at(VARIANTS)] + [(arm, level) for arm in same]:
        found = against(results, "loss", arm, base, there, level)
        lines.append(f"- {arm} against {base}: {_worse(found)}{_share(found, results, base, level)}")
    return "\n".join(lines)


def _of_rank(results: Results, level: str) -> str:
    """The LoRA of the variants' rank."""
    rank = results.arms_at(VARIANTS)[0].split()[-1]
    return next(arm for arm in results.arms_at(level) if arm == f"LoRA {rank}")


def _worse(found: Interval) -> str:
    return f"{verdict(found, 'worse', 'better')}, {found.text(sign=True)} in loss"


def _share(found: Interval, results: Results, base: str, level: str) -> str:
    mean = results.mean("loss", base, level).mean
    return f" ({found.mean / mean:+.0%})" if mean > 0 and found.n else ""


def _capacity(results: Results) -> str:
    rows = []
    for level, count in row_levels(results).items():
        for arm in results.arms_at(level):
            if arm == FULL or not _everywhere(results, arm):
                continue
            held = capacity(results, arm, level)
            found = [against(results, metric, arm, FULL, level) for metric in ("loss", "trained_rows_loss")]
            words = verdict(found[1], "behind", "ahead")
            rows.append(
                [
                    f"{count:,}",
                    arm,
                    "missing" if held is None else f"{held:.2g}",
                    *(one.text(sign=True) for one in found),
                    words,
                ]
            )
    heads = ["rows", "arm", "bits held a bit", "loss − full", "on trained rows − full", "on trained rows"]
    learn = [f"{tokens(results, level) or 0:,.0f} tokens in {level}" for level in row_levels(results)]
    return (
        "As many steps at each number of rows, so that fewer rows are seen more often. By the rule of thumb of 1 bit "
        f"a trained token ({', '.join(learn)}) and 2 bits a parameter, an arm holds so many bits for each that there "
        "is to learn; below 1 it should fall behind full fine-tuning. What falls behind above 1 isn't short of room by "
        "this rule.\n\n" + table(heads, rows)
    )


def _everywhere(results: Results, arm: str) -> bool:
    return all(arm in results.arms_at(level) for level in row_levels(results))


def _batches(results: Results, level: str, large: str) -> str:
    rows, lines = [], []
    for arm in results.arms_at(large):
        means = [results.mean("loss", arm, one).text() for one in (level, large)]
        rates = [results.rate(arm, one) for one in (level, large)]
        rows.append([arm, *means, *(f"{rate:g}" if rate else "missing" for rate in rates)])
        if arm != FULL:
            gaps = [_gap(results, arm, one) for one in (level, large)]
            found = paired(gaps[1], gaps[0])
            words = verdict(found, "loses more at the large batch", "loses less at the large batch")
            lines.append(f"- {arm} − full: {words}, by {found.text(sign=True)}")
    size = next(one.values["batch_size"] for one in results.preset.levels if one.name == level)
    heads = ["arm", f"loss, batch {size}", f"loss, {large}", f"rate, batch {size}", f"rate, {large}"]
    return "The same rows, seen once at both sizes.\n\n" + table(heads, rows) + "\n\n" + "\n".join(lines)


def _gap(results: Results, arm: str, level: str) -> dict[int, float]:
    """An arm minus full by seed."""
    ours, theirs = results.last("loss", arm, level), results.last("loss", FULL, level)
    return {seed: ours[seed] - theirs[seed] for seed in set(ours) & set(theirs)}
