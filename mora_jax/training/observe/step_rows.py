"""The row of metrics of a step: read from the device, looked through for trouble."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from mora_jax.errors import InputError
from mora_jax.training.adalora import RankBudget
from mora_jax.training.config.schema import Config
from mora_jax.training.hooks import Row
from mora_jax.training.observe.loss_spikes import Spikes
from mora_jax.training.observe.observer import Observer
from mora_jax.training.step import StepMetrics

#: What a row says of a step, by name: given its number and its metrics on the host. To add a metric, write one.
RowMetric = Callable[[int, StepMetrics], dict[str, float]]


def of_every_step(step: int, metrics: StepMetrics) -> dict[str, float]:
    """What all runs have."""
    return {
        "loss": float(metrics.loss),
        "learning_rate": float(metrics.learning_rate),
        "grad_norm": float(metrics.grad_norm),
        "tokens": int(metrics.tokens),
        "trained_tokens": int(metrics.trained_tokens),
        "skipped": int(metrics.skipped),
    }


def divergence(step: int, metrics: StepMetrics) -> dict[str, float]:
    """The mean divergence from the base, where the loss has it."""
    return {"kl": float(metrics.kl)}


def of_preferences(step: int, metrics: StepMetrics) -> dict[str, float]:
    """Those of an objective of preferences; what no example of the step says is left out."""
    return {name: float(value) for name, value in metrics.of_loss.items() if math.isfinite(value)}


class StepRows:
    """Turns the metrics of steps into rows.

    Args:
        config: of the run.
        observer: measures the steps.
        budget: AdaLoRA's; None without.
        read: fetches a step's metrics, and says when they were there (`Runner.read`).
        note: is told of trouble, in a line each.

    Attributes:
        last_loss: of the last step whose loss was finite; NaN before the first.
    """

    def __init__(
        self,
        config: Config,
        observer: Observer,
        budget: RankBudget | None,
        read: Callable[[StepMetrics], tuple[StepMetrics, float]],
        note: Callable[[str], None],
    ):
        self._config, self._observer, self._read, self._note = config, observer, read, note
        self._metrics: list[RowMetric] = [of_every_step]
        self._metrics += [divergence] if config.loss.kl_weight or config.loss.reference == "base" else []
        self._metrics += [of_preferences] if config.loss.preference else []
        self._metrics += [] if budget is None else [budget.row]
        self._nonfinite = NonFinite(config.train.max_skipped, config.optimizer.learning_rate)
        self._spikes = Spikes()
        self.last_loss = math.nan

    def remember(self, row: Row) -> None:
        """Takes up what a row of a step before a resumption says."""
        if row.get("loss") is not None:
            self.last_loss = row["loss"]
            self._spikes.note(row["step"], row["loss"])

    def __call__(self, step: int, on_device: StepMetrics, last: bool) -> dict[str, Any] | None:
        """Waits for a step's metrics: its row; None for a step that is not logged."""
        asked = time.perf_counter()
        metrics, there = self._read(on_device)
        clock = self._observer.clock
        clock.waited_for_device(asked)
        row: dict[str, Any] = {"step": step}
        for metric in self._metrics:
            row |= metric(step, metrics)
        counts = row["tokens"], row["trained_tokens"]
        times = self._observer.lap(there, *counts)
        skip = self._nonfinite.note(step, row["loss"], row["grad_norm"], row["skipped"], int(metrics.skipped_in_row))
        for note in (skip, self._spikes.note(step, row["loss"]) if counts[1] else None):
            if note:
                self._note(note)
        self.last_loss = row["loss"] if math.isfinite(row["loss"]) else self.last_loss
        logged = last or step % self._config.train.log_every == 0
        return row | self._observer.measures(times, *counts) if logged else None


class NonFinite:
    """What a run says of updates that were left out because loss or gradient was not finite, and when it stops.

    The compiled step leaves them out itself (see `chosen` in state.py).

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
