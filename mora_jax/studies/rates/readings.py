"""What conclusion and figures of the study read from its table."""

from __future__ import annotations

import math

from mora_jax.data.inspect.advice import BITS_A_PARAMETER, bits_to_learn
from mora_jax.studies.intervals import Interval, interval, paired
from mora_jax.studies.rates.minima import best_rate
from mora_jax.studies.results import Results

VARIANTS, BATCH = "variants", "batch"
FULL = "full"


def sweep_level(results: Results) -> str:
    """The level of the whole grid."""
    return next(level.name for level in results.preset.levels if level.neighbours)


def row_levels(results: Results) -> dict[str, int]:
    """The levels that differ in the number of examples alone, most first."""
    levels = [one for one in results.preset.levels if not one.name.startswith((VARIANTS, BATCH))]
    return {level.name: level.values["examples"] for level in levels}


def large_batch(results: Results) -> str | None:
    """The level of large batches."""
    return next((level for level in results.levels if level.startswith(BATCH)), None)


def grid(results: Results, metric: str, arm: str, level: str) -> dict[float, float]:
    """The values after the last step by learning rate, on the seed that chooses."""
    return {rate: rows[-1][1] for rate, rows in results.curves_by_rate(metric, arm, level).items()}


def positions(results: Results, arm: str, level: str) -> dict[int, float]:
    """The logarithm of the best rate by reported seed, where it is found."""
    found = {seed: best_rate(losses) for seed, losses in results.by_rate("loss", arm, level).items()}
    return {seed: math.log(rate) for seed, rate in found.items() if rate is not None}


def position(results: Results, arm: str, level: str) -> Interval:
    """The logarithm of the best rate, over reported seeds."""
    return interval(positions(results, arm, level).values())


def ratio(results: Results, arm: str, other: str, level: str) -> Interval:
    """The logarithm of one arm's best rate over another's, paired by seed."""
    return paired(positions(results, arm, level), positions(results, other, level))


def beside(results: Results, arm: str, level: str, *, above: bool) -> tuple[float, Interval] | None:
    """The next rate below or above the chosen one, and what the loss is higher there; None where none was tried."""
    chosen = results.rate(arm, level)
    by_seed = results.by_rate("loss", arm, level)
    rates = {rate for values in by_seed.values() for rate in values}
    others = [rate for rate in rates if chosen is not None and (rate > chosen if above else rate < chosen)]
    if not others:
        return None
    [other] = others
    own = results.last("loss", arm, level)
    return other, paired({seed: values[other] for seed, values in by_seed.items() if other in values}, own)


def tokens(results: Results, level: str) -> float | None:
    """The trained tokens of a level's data, each once; the mean over cells."""
    frame = results.frame[(results.frame["metric"] == "trained_tokens") & (results.frame["level"] == level)]
    return None if frame.empty else float(frame["value"].mean())


def capacity(results: Results, arm: str, level: str) -> float | None:
    """Bits that an arm's parameters hold for each bit that there is to learn at a level, by the rule of thumb."""
    parameters, count = results.parameters(arm), tokens(results, level)
    return BITS_A_PARAMETER * parameters / bits_to_learn(count) if parameters and count else None


def against(
    results: Results, metric: str, arm: str, other: str, level: str, other_level: str | None = None
) -> Interval:
    """One arm minus another, paired by seed; the other's level may be another one."""
    there = level if other_level is None else other_level
    return paired(results.last(metric, arm, level), results.last(metric, other, there))
