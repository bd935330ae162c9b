"""What a study claims: paired differences of every metric, corrected for how many there are, and run once more."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mora_jax.studies.intervals import LEVEL, Interval, differences, holm, interval
from mora_jax.studies.results import Results
from mora_jax.studies.study import EQUAL_RATE, Contrast, Metric


@dataclass(frozen=True)
class Claim:
    """A contrast over seeds, as in `claims.json`.

    Attributes:
        claim, metric, level: of the contrast.
        better: which sign of the effect is the better one; 0 for neither.
        effect: the mean difference; None where no seed has one.
        low, high: its 95 % interval, not widened for other claims; None for fewer than two seeds.
        n: seeds.
        diverged: seeds that are left out since a run of theirs diverged or failed.
        p: of the t-test, by Holm's method for all claims about the first metric or all about the others.
        decided: whether `p` is below 0.05.
        detectable: the difference that would have been shown in four of five studies like this one.
        halfway: the effect after half of the steps.
        robust: whether the study comes to the same from perturbed weights; None where that was not run.
        cells: their names.
    """

    claim: str
    metric: str
    level: str
    better: int
    effect: float | None
    low: float | None
    high: float | None
    n: int
    diverged: int
    p: float | None
    decided: bool
    detectable: float | None
    halfway: float | None
    robust: bool | None
    cells: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """In words."""
        if self.effect is None:
            return "missing"
        if self.n < 2:
            return "one seed, so undecided"
        if not self.decided:
            return "no difference shown"
        if not self.better:
            return "higher" if self.effect > 0 else "lower"
        return "better" if self.effect * self.better > 0 else "worse"

    def effect_text(self) -> str:
        """With its interval."""
        if self.effect is None:
            return "missing"
        return f"{self.effect:+.3f}" + (f" ± {self.high - self.effect:.3f}" if self.high is not None else "")


def claims(results: Results) -> list[Claim]:
    """All of a study, those about its first metric first corrected among themselves, then the others."""
    primary = results.study.metrics[0]
    again = {_key(one): interval(one.values.values()) for one in contrasts(results.perturbed())}
    looked_at = [(one, interval(one.values.values())) for one in contrasts(results)]
    families = [(one.metric == primary, mean.p) for one, mean in looked_at]
    corrected = dict[int, float]()
    for family in (True, False):
        tested = [(place, p) for place, (of, p) in enumerate(families) if of == family and p is not None]
        corrected |= dict(zip((place for place, _ in tested), holm([p for _, p in tested]), strict=True))
    stated = [_claim(one, mean, corrected.get(place)) for place, (one, mean) in enumerate(looked_at)]
    return [
        replace(claim, robust=_robust(claim, again.get((claim.claim, claim.metric, claim.level)))) for claim in stated
    ]


def _key(contrast: Contrast) -> tuple[str, str, str]:
    return contrast.claim, contrast.metric.head, contrast.level


def _claim(one: Contrast, mean: Interval, p: float | None) -> Claim:
    halfway = interval(one.halfway.values()).mean
    return Claim(
        claim=one.claim,
        metric=one.metric.head,
        level=one.level,
        better=one.metric.better,
        effect=mean.mean if mean.n else None,
        low=None if mean.half is None else mean.low,
        high=None if mean.half is None else mean.high,
        n=mean.n,
        diverged=mean.lost,
        p=p,
        decided=p is not None and p < LEVEL,
        detectable=mean.detectable,
        halfway=None if math.isnan(halfway) else halfway,
        robust=None,
        cells=one.cells,
    )


def _robust(claim: Claim, again: Interval | None) -> bool | None:
    """From perturbed weights a decided effect has its sign and an interval without 0, another one has 0 in it."""
    if again is None or again.half is None or claim.effect is None:
        return None
    shown = again.low > 0 or again.high < 0
    return shown and again.mean * claim.effect > 0 if claim.decided else not shown


def contrasts(results: Results) -> Iterator[Contrast]:
    """Every pair of arms by every metric, controls at equal rates too, and what the study compares beside them."""
    for level in results.levels:
        for arm, other in results.study.pairs(results, level):
            for metric in results.study.metrics:
                if results.has(metric.name):
                    yield _contrast(results, metric, (arm, level), (other, level), f"{arm} − {other}")
        for one, control in results.preset.pairs():
            if one.name == level and control.control_of in results.arms_at(level):
                yield from _at_equal_rates(results, control.name, control.control_of, level)
    yield from results.study.contrasts(results)


def _at_equal_rates(results: Results, arm: str, other: str, level: str) -> Iterator[Contrast]:
    rate = results.rate(other, level)
    if rate is None or results.rate(arm, level) in (None, rate) or results.is_perturbed:
        return  # the reported cells have equal rates already, or none was run again
    for metric in results.study.metrics:
        if results.has(metric.name):
            claim = f"{arm} − {other}, both at {rate:g}"
            yield _contrast(results, metric, (arm, level), (other, level), claim, stage=EQUAL_RATE)


def _contrast(
    results: Results,
    metric: Metric,
    first: tuple[str, str],
    second: tuple[str, str],
    claim: str,
    *,
    stage: str = "reported",
) -> Contrast:
    """The first (arm, level) minus the second; `stage` is the first one's."""
    at = [
        differences(results.values(metric, *first, stage, share=share), results.values(metric, *second, share=share))
        for share in (1.0, 0.5)
    ]
    cells = tuple(results.cells(*first, stage) + results.cells(*second))
    return Contrast(claim, metric, first[1], at[0], cells, {} if metric.best_by else at[1])


def between_levels(results: Results, metric: Metric, arm: str, level: str, other: str, other_level: str) -> Contrast:
    """An arm at one level minus an arm at another."""
    return _contrast(results, metric, (arm, level), (other, other_level), f"{arm} − {other} ({other_level})")


def to_json(stated: list[Claim]) -> str:
    """The file `claims.json`: a list of objects, with numbers of six digits, which are the same on all machines."""

    def rounded(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return float(f"{value:.6g}") if math.isfinite(value) else None

    objects = [{name: rounded(value) for name, value in asdict(claim).items()} for claim in stated]
    return json.dumps(objects, indent=1, ensure_ascii=False) + "\n"
