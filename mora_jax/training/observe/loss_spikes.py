"""Spikes of the training loss: a step that stands far above those before it."""

from __future__ import annotations

import math
import statistics
from collections import deque

_NORMAL = 1.4826  # a normal distribution's standard deviation, in units of its median absolute deviation


class Spikes:
    """Compares each loss with the median of those before it, in robust standard deviations.

    Median and median absolute deviation (Hampel, 1974) are not moved by the spikes themselves. Of a run of spikes the
    first is reported; a loss that stays high moves the median in time and is then normal.

    Args:
        window: losses that are looked back upon.
        least: losses that must be known first.
        threshold: robust standard deviations above the median from which a loss is a spike.
    """

    def __init__(self, window: int = 64, least: int = 16, threshold: float = 8.0):
        self._losses: deque[float] = deque(maxlen=window)
        self._least, self._threshold = least, threshold
        self._inside = False

    def note(self, step: int, loss: float) -> str | None:
        """Takes a step's loss in; one line about it where a spike begins."""
        if not math.isfinite(loss):
            return None
        score, median = self._score(loss)
        count = len(self._losses)
        self._losses.append(loss)
        began = score > self._threshold and not self._inside
        self._inside = score > self._threshold
        if not began:
            return None
        return (
            f"step {step}: the loss {loss:.4f} is a spike, {score:.1f} robust standard deviations above the median "
            f"{median:.4f} of the {count} steps before"
        )

    def _score(self, loss: float) -> tuple[float, float]:
        if len(self._losses) < self._least:
            return 0.0, math.nan
        median = statistics.median(self._losses)
        deviation = _NORMAL * statistics.median(abs(other - median) for other in self._losses)
        # Losses that are all but equal have no scale of their own; a thousandth of them is no spike.
        return (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12), median
