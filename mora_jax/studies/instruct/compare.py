"""What the conclusion and the figures of the study have in common: its losses, methods and paired differences."""

from __future__ import annotations

from mora_jax.studies.intervals import Interval, interval, paired
from mora_jax.studies.results import Results
from mora_jax.studies.study import Level

LOSS, GUIDE = "test_loss", "validation_loss"


def methods(results: Results) -> list[str]:
    """The methods, in the order of the arms."""
    return list(dict.fromkeys(arm.split(" ", 1)[0] for arm in results.arms))


def losses(results: Results, method: str, level: str) -> list[str]:
    """The losses that a method is trained with at a level, masked loss left out."""
    names = [arm.split(" ", 1) for arm in results.arms_at(level)]
    return [loss for one, loss in names if one == method and loss != "masked"]


def at_rows(results: Results, rows: int) -> list[Level]:
    """The levels with so many rows, by rising ratio."""
    return [level for level in results.preset.levels if level.values["rows"] == rows]


def all_rows(results: Results) -> list[int]:
    """The numbers of rows."""
    return sorted({level.values["rows"] for level in results.preset.levels})


def gains(results: Results, first: str, second: str, level: str, *, best: bool = True) -> dict[int, float]:
    """The test loss of the first arm minus that of the second, by seed: above 0 the second is better.

    Args:
        results: of the study.
        first, second: arms.
        level: at which both are compared.
        best: each at its epoch with the lowest validation loss; else after the last.
    """
    found = [
        results.best(LOSS, GUIDE, arm, level) if best else results.last(LOSS, arm, level) for arm in (first, second)
    ]
    return {seed: found[0][seed] - found[1][seed] for seed in found[0] if seed in found[1]}


def gain(results: Results, first: str, second: str, level: str, *, best: bool = True) -> Interval:
    """The mean of `gains` over seeds, with its interval."""
    return interval(gains(results, first, second, level, best=best).values())


def change(results: Results, first: str, second: str, lower: str, higher: str) -> Interval:
    """The gain at one level minus that at another, paired by seed."""
    return paired(gains(results, first, second, higher), gains(results, first, second, lower))


def ratio(results: Results, level: str) -> float:
    """Instruction tokens an answer token, the mean over the reported seeds."""
    for arm in results.arms_at(level):
        found = results.mean("ratio", arm, level)
        if found.n:
            return found.mean
    return float("nan")
