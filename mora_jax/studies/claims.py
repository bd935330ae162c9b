"""What a study claims: paired differences of every metric, corrected for how many there are, and run once more."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mora_jax.studies.intervals import LEVEL, Interval, differences, holm, interval
from mora_jax.studies.results import Results
from mora_jax.studies.study import EQUAL_RATE, REPORTED, Contrast, Metric


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
    cells: Sequence[str]

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
    """All of a study, those about its first metric corrected among themselves, and so are the others."""
    looked_at = list(contrasts(results))
    means = [interval(one.values.values()) for one in looked_at]
    perturbed = Results(results.frame, results.study, results.preset, perturbed=True)
    again = {_key(one): interval(one.values.values()) for one in contrasts(perturbed)}
    corrected = dict[int, float]()
    for primary in (True, False):
        tested = {
            place: mean.p
            for place, (one, mean) in enumerate(zip(looked_at, means, strict=True))
            if (one.metric == results.study.metrics[0]) is primary and mean.p is not None
        }
        corrected |= dict(zip(tested, holm(list(tested.values())), strict=True))
    return [
        _claim(one, mean, corrected.get(place), again.get(_key(one)))
        for place, (one, mean) in enumerate(zip(looked_at, means, strict=True))
    ]


def _key(contrast: Contrast) -> tuple[str, str, str]:
    return contrast.claim, contrast.metric.head, contrast.level


def _claim(one: Contrast, mean: Interval, p: float | None, again: Interval | None) -> Claim:
    """A contrast as it is stated; from perturbed weights, `again`, a robust effect has its sign and an interval without
    0, and one that is not decided has 0 in it."""
    decided, halfway = p is not None and p < LEVEL, interval(one.halfway.values()).mean
    robust = None
    if again is not None and again.half is not None and mean.n:
        shown = again.low > 0 or again.high < 0
        robust = shown and again.mean * mean.mean > 0 if decided else not shown
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
        decided=decided,
        detectable=mean.detectable,
        halfway=None if math.isnan(halfway) else halfway,
        robust=robust,
        cells=one.cells,
    )


def contrasts(results: Results) -> Iterator[Contrast]:
    """Every pair of arms by every metric, controls at equal rates too, and what the study compares beside them."""
    metrics = [metric for metric in results.study.metrics if results.has(metric.name)]
    for level in results.levels:
        for arm, other in results.study.pairs(results, level):
            for metric in metrics:
                yield contrast(results, metric, (arm, level), (other, level), f"{arm} − {other}")
        for control in [arm for one, arm in results.preset.pairs() if one.name == level and arm.control_of]:
            name, other = control.name, control.control_of
            rate = results.rate(other, level)
            # Else the reported cells have equal rates already, or none was run again.
            if rate is not None and results.rate(name, level) not in (None, rate) and not results.perturbed:
                for metric in metrics:
                    claim = f"{name} − {other}, both at {rate:g}"
                    yield contrast(results, metric, (name, level), (other, level), claim, stage=EQUAL_RATE)
    yield from results.study.contrasts(results)


def contrast(
    results: Results,
    metric: Metric,
    first: tuple[str, str],
    second: tuple[str, str],
    claim: str,
    *,
    stage: str = REPORTED,
) -> Contrast:
    """The first (arm, level) minus the second; `stage` is the first one's."""
    end, halfway = (
        differences(results.values(metric, *first, stage, share=share), results.values(metric, *second, share=share))
        for share in (1.0, 0.5)
    )
    cells = results.cells(*first, stage) + results.cells(*second)
    return Contrast(claim, metric, first[1], end, cells, {} if metric.best_by else halfway)


def to_json(stated: list[Claim]) -> str:
    """The file `claims.json`: a list of objects, with numbers of six digits, which are the same on all machines."""

    def rounded(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return float(f"{value:.6g}") if math.isfinite(value) else None

    objects = [{name: rounded(value) for name, value in asdict(claim).items()} for claim in stated]
    return json.dumps(objects, indent=1, ensure_ascii=False) + "\n"
