"""Updates of which the loss or the gradient is not finite: left out inside the compiled step, counted, and reported.

One infinite or undefined number in a gradient would make every trained weight and every moment of the optimizer
undefined for good. The step therefore chooses between the new values and the old ones by one number that all devices
share. The choice is elementwise and needs the old values and the new ones at once: XLA on CPU takes up to one more copy
of what is trained for it.

A step that is left out still counts as a step: its batch is used up, and the learning rate goes on as if it had been
taken. Weights, moments and the optimizer's own count of updates (Adam's correction of its bias) stay as they were.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mora_jax.errors import InputError
from mora_jax.training.optimizer_offload import OnHost

Array = jax.Array


class Skips(NamedTuple):
    """How many updates were left out, part of the state that checkpoints hold.

    Attributes:
        total: int32, since the run's first step.
        in_row: int32, of the last steps without a break.
    """

    total: Array
    in_row: Array

    @classmethod
    def none(cls) -> Skips:
        """Before the first step; two arrays, since a state is donated and no buffer can be given away twice."""
        return cls(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def after(self, taken: Array) -> Skips:
        """After a step whose update was taken or left out."""
        left_out = jnp.logical_not(taken).astype(jnp.int32)
        return Skips(self.total + left_out, (self.in_row + 1) * left_out)


def chosen(taken: Array, new: Any, old: Any) -> Any:
    """`new` where the update is taken, else `old`: trained arrays, or an optax state.

    Schedules count steps, so theirs is always the new state; moments in the host's memory are chosen already.
    """

    def choose(new: Any, old: Any) -> Any:
        return new if _is_new(new) else jnp.where(taken, new, old)

    return jax.tree.map(choose, new, old, is_leaf=_is_new)


def _is_new(node: Any) -> bool:
    return isinstance(node, (optax.ScaleByScheduleState, OnHost))


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
