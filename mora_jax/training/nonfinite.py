"""What a run says of updates that were left out because their loss or gradient was not finite, and when it stops.

The compiled step leaves them out itself (see `chosen` in state.py).
"""

from __future__ import annotations

import math

from mora_jax.errors import InputError


class NonFinite:
    """What a run says of updates that were left out, and when it stops.

    Args:
        limit: updates left out one after the other at which the run stops.
        learning_rate: the run's, for the advice.
    """

    def __init__(self, limit: int, learning_rate: float):
        self._limit, self._learning_rate = limit, learning_rate

    def note(self, step: int, loss: float, grad_norm: float, total: int, in_row: int) -> str | None:
        """One line about a step whose update was left out; None about any other.

        Args:
            step: its number, from 1.
            loss, grad_norm: as the step reported them.
            total, in_row: updates left out so far, this one included.

        Raises:
            InputError: it was one too many.
        """
        if in_row == 0:
            return None
        what = "gradient's norm" if math.isfinite(loss) else "loss"
        value = grad_norm if math.isfinite(loss) else loss
        if in_row < self._limit:
            return (
                f"step {step}: the {what} is {value}; the update is skipped ({in_row} in a row of at most "
                f"{self._limit}, {total} in all)"
            )
        steps = f"at step {step}" if in_row == 1 else f"at step {step}, number {in_row} in a row that is not finite"
        raise InputError(
            f"the {what} is {value} {steps}: lower optimizer.learning_rate (now {self._learning_rate:g}), set "
            f"optimizer.warmup_steps, or look at the data; train.max_skipped={self._limit} allows no more"
        )
