"""Learning against forgetting: the course of a run as pairs of losses, and what was forgotten at equal learning."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mora_jax.studies.results import Results

#: (loss on what is learned, loss on what was known), evaluation by evaluation.
Path = Sequence[tuple[float, float]]


def paths(results: Results, arm: str, learned: str, known: str) -> dict[int, Path]:
    """The path of each reported seed."""
    return _joined(results.curves(learned, arm), results.curves(known, arm))


def paths_by_rate(results: Results, arm: str, learned: str, known: str) -> dict[float, Path]:
    """The path at each learning rate that was tried, on the seed that chooses."""
    return _joined(results.curves_by_rate(learned, arm), results.curves_by_rate(known, arm))


def _joined(learned: Mapping[Any, Any], known: Mapping[Any, Any]) -> dict[Any, Path]:
    found: dict[Any, Path] = {}
    for key, rows in learned.items():
        others = dict(known.get(key, ()))
        found[key] = [(value, others[step]) for step, value in rows if step in others]
    return found


def known_at(path: Path, target: float) -> float | None:
    """The loss on what was known where that on what is learned first falls to `target`; by a line between points.

    None where it never does.

    >>> known_at([(4.0, 1.0), (2.0, 1.4), (1.0, 2.0)], 1.5)
    1.7
    """
    if path and path[0][0] <= target:
        return path[0][1]
    for (before, there), (after, then) in itertools.pairwise(path):
        if after <= target < before:
            share = (before - target) / (before - after)
            return there + share * (then - there)
    return None


def lowest_known_at(by_rate: Mapping[float, Path], target: float) -> tuple[float, float] | None:
    """The lower envelope over learning rates: which has forgotten least at `target`, and its loss; None: none."""
    found = [(known, rate) for rate, path in by_rate.items() if (known := known_at(path, target)) is not None]
    if not found:
        return None
    known, rate = min(found)
    return rate, known
