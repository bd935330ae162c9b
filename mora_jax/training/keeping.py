"""Which checkpoints of a run stay: the newest, and those with the lowest evaluation loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class Keeping:
    """Orbax's policy of what to keep: the newest, and the best by a score of ours.

    Attributes:
        scores: evaluation losses by step, of the best checkpoints.
    """

    def __init__(self, newest: int, best: int):
        self._newest, self._best = newest, best
        self.scores: dict[int, float] = {}

    def is_best(self, loss: float | None) -> bool:
        if not self._best or loss is None or not math.isfinite(loss):
            return False
        return len(self.scores) < self._best or loss < max(self.scores.values())

    def scored(self, step: int, loss: float | None) -> None:
        """Takes a score in, and drops those that are no longer among the best."""
        if loss is not None and self.is_best(loss):
            self.scores[step] = loss
            kept = sorted(self.scores.items(), key=lambda item: (item[1], item[0]))[: self._best]
            self.scores = dict(kept)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether each of the checkpoints, oldest first, stays."""
        first = len(checkpoints) - self._newest
        return [index >= first or info.step in self.scores for index, info in enumerate(checkpoints)]
