"""The row of metrics of a step: read from the device, looked through for trouble, recorded and shown."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from mora_jax.training.adalora import RankBudget
from mora_jax.training.config.schema import Config
from mora_jax.training.display.plain import Display
from mora_jax.training.nonfinite import NonFinite
from mora_jax.training.observe.loss_spikes import Spikes
from mora_jax.training.observe.observer import Observer
from mora_jax.training.step import StepMetrics


class StepRows:
    """Turns the metrics of steps into rows.

    Args:
        config: of the run.
        observer: measures the steps and writes the rows.
        display: shows them.
        budget: AdaLoRA's; None without.
        seconds_left: what is left after a step besides steps, in seconds.
        call: called with every row that is logged.
        steps: of the run.
        read: fetches a step's metrics, and says when they were there (`Runner.read`).

    Attributes:
        last_loss: of the last step whose loss was finite.
        last_step: the run's, which is always logged.
    """

    def __init__(
        self,
        config: Config,
        observer: Observer,
        display: Display,
        budget: RankBudget | None,
        seconds_left: Callable[[int], float],
        call: Callable[[dict[str, Any]], None],
        steps: int,
        read: Callable[[StepMetrics], tuple[StepMetrics, float]],
    ):
        self._config, self._observer, self._display, self._budget = config, observer, display, budget
        self._seconds_left, self._call, self._steps, self._read = seconds_left, call, steps, read
        self._nonfinite = NonFinite(config.train.max_skipped, config.optimizer.learning_rate)
        self._spikes = Spikes()
        self.last_loss, self.last_step = math.nan, steps

    def remember(self, row: dict[str, Any]) -> None:
        """Takes up what a row of a step before a resumption says."""
        if row.get("loss") is not None:
            self.last_loss = row["loss"]
            self._spikes.note(row["step"], row["loss"])

    def __call__(self, step: int, on_device: StepMetrics) -> None:
        """Waits for a step's metrics and records them."""
        asked = time.perf_counter()
        metrics, there = self._read(on_device)
        self._observer.clock.waited_for_device(asked)
        counts = int(metrics.tokens), int(metrics.trained_tokens)
        times = self._observer.lap(there, *counts)
        loss, grad_norm, skipped = float(metrics.loss), float(metrics.grad_norm), int(metrics.skipped)
        skip = self._nonfinite.note(step, loss, grad_norm, skipped, int(metrics.skipped_in_row))
        for note in (skip, self._spikes.note(step, loss) if counts[1] else None):
            if note:
                self._display.note(note)
        self.last_loss = loss if math.isfinite(loss) else self.last_loss
        if step % self._config.train.log_every and step != self.last_step:
            return
        row = {
            "step": step,
            "loss": loss,
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": grad_norm,
            "tokens": counts[0],
            "trained_tokens": counts[1],
            "skipped": skipped,
            **self._observer.measures(times, *counts),
        }
        if self._config.loss.kl_weight:
            row["kl"] = float(metrics.kl)
        if self._budget is not None:
            row |= {"penalty": float(metrics.penalty), "mean_rank": self._budget.mean_rank(step)}
        self._observer.write(row)
        steps_left = (self._steps - step) * self._observer.clock.mean_step
        self._display.step(row | {"seconds_left": steps_left + self._seconds_left(step)})
        self._call(row)
