"""What the steps of a run say and cost: a row of metrics for each, its times, utilisation, memory and compilations."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax

from mora_jax.adapters.products.quantization import packed_sizes
from mora_jax.errors import InputError
from mora_jax.models.decoder import Decoder
from mora_jax.training.adalora import RankBudget
from mora_jax.training.config.schema import Config
from mora_jax.training.display import bytes_words
from mora_jax.training.hooks import Hook, Point, Row, Run
from mora_jax.training.observe.compile_log import CompileLog, device_memory, peak_memory
from mora_jax.training.observe.flops import CONVENTION, StepFlops, peak_flops
from mora_jax.training.step import StepMetrics

#: What a row says of a step, by name: given its number and its metrics on the host. To add a metric, write one.
RowMetric = Callable[[int, StepMetrics], dict[str, float]]


def of_every_step(step: int, metrics: StepMetrics) -> dict[str, float]:
    """What all runs have; the learning rate where the optimizer tells it."""
    rate = float(metrics.learning_rate)
    return {
        "loss": float(metrics.loss),
        **({} if math.isnan(rate) else {"learning_rate": rate}),
        "grad_norm": float(metrics.grad_norm),
        "tokens": int(metrics.tokens),
        "trained_tokens": int(metrics.trained_tokens),
        "skipped": int(metrics.skipped),
    }


def divergence(step: int, metrics: StepMetrics) -> dict[str, float]:
    """The mean divergence from the base, where the loss has it."""
    return {"kl": float(metrics.kl)}


def of_loss(step: int, metrics: StepMetrics) -> dict[str, float]:
    """Those of an objective of preferences, or the balance of experts; what no example of the step says is left out."""
    return {name: float(value) for name, value in metrics.of_loss.items() if math.isfinite(value)}


def row_metrics(config: Config, budget: RankBudget | None) -> list[RowMetric]:
    """The metrics of a run's rows.

    Args:
        config: of the run.
        budget: AdaLoRA's; None without.
    """
    metrics: list[RowMetric] = [of_every_step]
    metrics += [divergence] if config.loss.kl_weight or config.loss.reference == "base" else []
    metrics += [of_loss] if config.loss.preference or config.loss.balance_weight else []
    return metrics + ([] if budget is None else [budget.row])


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


_NORMAL = 1.4826  # a normal distribution's standard deviation, in units of its median absolute deviation


class Spikes:
    """Compares each loss with the median of those before it, in robust standard deviations.

    Median and median absolute deviation (Hampel, 1974) are not moved by the spikes themselves. Of a run of spikes the
    first is reported; a loss that stays high moves the median in time and is then normal.

    Attributes:
        least: losses that must be known first.
        threshold: robust standard deviations above the median from which a loss is a spike.
    """

    least, threshold = 16, 8.0

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=64)  # that are looked back upon
        self._inside = False

    def note(self, step: int, loss: float) -> str | None:
        """Takes a step's loss in; one line about it where a spike begins."""
        if not math.isfinite(loss):
            return None
        score, median = self._score(loss)
        count = len(self._losses)
        self._losses.append(loss)
        began = score > self.threshold and not self._inside
        self._inside = score > self.threshold
        if not began:
            return None
        return (
            f"step {step}: the loss {loss:.4f} is a spike, {score:.1f} robust standard deviations above the median "
            f"{median:.4f} of the {count} steps before"
        )

    def _score(self, loss: float) -> tuple[float, float]:
        if len(self._losses) < self.least:
            return 0.0, math.nan
        median = statistics.median(self._losses)
        deviation = _NORMAL * statistics.median(abs(other - median) for other in self._losses)
        # Losses that are all but equal have no scale of their own; a thousandth of them is no spike.
        return (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12), median


class StepTimes(NamedTuple):
    """Seconds from the moment at which the step before was known to be done to that of this one.

    The three parts make up the whole. The device computes during all of them: the loop sends the next step before it
    waits for this one. So `device > 0` says that the loop was there first and the device was never short of work;
    `device` near 0 says that data (`data_wait`) or the loop (`host`) is what holds the run up.

    Attributes:
        step: the whole.
        data_wait: the loop had no batch to send.
        host: its own work: sending the step, writing metrics, showing them.
        device: it waited for the device.
    """

    step: float = 0.0
    data_wait: float = 0.0
    host: float = 0.0
    device: float = 0.0

    def row(self) -> dict[str, float]:
        """As keys of `metrics.jsonl` and `summary.json`."""
        return {f"{name}_seconds": seconds for name, seconds in self._asdict().items()}


class StepClock:
    """Measures `StepTimes`.

    Attributes:
        total: of all steps so far.
    """

    def __init__(self) -> None:
        self.total = StepTimes()
        self._steps = 0
        self.restart()

    def restart(self) -> None:
        """The next step's time begins now; for what is no part of a step, such as an evaluation."""
        self._start, self._fresh = time.perf_counter(), True
        self._data = self._device = 0.0

    def first_sent(self) -> None:
        """A step goes to the device now. If it is the first since the last start, that was now; for a loop which others
        may hold up in between."""
        if self._fresh:
            self.restart()
        self._fresh = False

    def exclude(self, seconds: float) -> None:
        """Leaves out what has just taken so long, such as compiling."""
        self._start += seconds

    def waited_for_data(self, since: float) -> None:
        """The loop got its batch now and had asked at `since`, by `time.perf_counter`."""
        self._data += time.perf_counter() - since

    def waited_for_device(self, since: float) -> None:
        """The device's result is there now and the loop had asked at `since`."""
        self._device += time.perf_counter() - since

    @property
    def mean_step(self) -> float:
        """Seconds of a step so far, 0 before the first; compiling and evaluations are no part of it."""
        return self.total.step / max(self._steps, 1)

    def lap(self, now: float | None = None) -> StepTimes:
        """A step is done, now or at `now` by `time.perf_counter`: its times. The next one's begins."""
        now = time.perf_counter() if now is None else now
        seconds = max(now - self._start, 1e-9)
        times = StepTimes(seconds, self._data, max(seconds - self._data - self._device, 0.0), self._device)
        self.total = StepTimes(*map(sum, zip(self.total, times, strict=True)))
        self._steps += 1
        self._start, self._data, self._device = now, 0.0, 0.0
        return times


class Observer(Hook):
    """Measures the steps of a run in this process.

    Attributes:
        clock: splits the time of steps.
        last_loss: of the last step whose loss was finite; NaN before the first.
    """

    def __init__(self, run: Run):
        self._run, config, assembly = run, run.config, run.assembly
        loss = config.loss
        crossed = int(loss.preference is not None and loss.preference.labelled)  # answers of other rows
        self._flops: StepFlops | None = None  # nothing says what a user's own model computes
        if isinstance(run.setup.model, Decoder):
            self._flops = StepFlops.of(
                run.setup.model.config,
                assembly.adapters,
                assembly.frozen,
                run.setup.train.lengths,
                base_passes=int(loss.kl_weight > 0) + (1 + crossed) * (loss.reference == "base"),
                tuned_passes=crossed,
                packed=packed_sizes(run.setup.model),
            )
        devices, process = run.runner.devices, jax.process_index()
        self._peak = peak_flops(devices)
        self._devices = [device for device in devices if device.process_index == process]
        self._metrics = row_metrics(config, assembly.budget)
        self._nonfinite = NonFinite(config.train.max_skipped, config.optimizer.learning_rate)
        self._spikes = Spikes()
        self._compile_log = CompileLog(run.directory.append_compilations)
        self._planned: dict[str, int] | None = None
        self._tokens, self._needed, self._palm = 0, 0.0, 0.0
        self.clock, self.last_loss = StepClock(), math.nan

    def __enter__(self) -> Self:
        self._compile_log.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._compile_log.__exit__(*exception)

    def remember(self, row: Row) -> None:
        if row.get("loss") is not None:
            self.last_loss = row["loss"]
            self._spikes.note(row["step"], row["loss"])

    def sent(self, step: int) -> None:
        """A step was sent to the device; reports what was compiled for it."""
        for one in self._compile_log.take(self._run.runner.compilation_log):
            # Compiling is reported on its own; it is no part of any step's time.
            self.clock.exclude(one.waited)
            planned = one.memory
            self._planned = max((self._planned, planned), key=lambda sizes: sizes["total"] if sizes else 0)
            # One change tells why; compile.jsonl has all of them.
            again = f" again for step {step} ({one.changed[0]})" if one.changed else ""
            size = f"; it takes {bytes_words(planned['total'])} a device" if planned else ""
            beside = f", {one.waited:.1f} s of it waited for" if one.waited < 0.9 * one.seconds else ""
            self._run.display.note(f"compiled the training step{again} in {one.seconds:.1f} s{beside}{size}")

    def row(self, step: int, on_device: StepMetrics, last: bool) -> dict[str, Any] | None:
        """Waits for a step's metrics: its row; None for a step that is not logged.

        `mfu` is None where the devices' peak isn't known.

        Raises:
            InputError: too many updates were left out because they were not finite.
        """
        asked = time.perf_counter()
        metrics, there = self._run.runner.read(on_device)
        self.clock.waited_for_device(asked)
        row: dict[str, Any] = {"step": step}
        for metric in self._metrics:
            row |= metric(step, metrics)
        loss, tokens, trained_tokens = row["loss"], row["tokens"], row["trained_tokens"]
        needed = 0.0
        self._tokens += tokens
        if self._flops is not None:
            needed = self._flops.needed(tokens, trained_tokens)
            self._needed += needed
            self._palm += self._flops.palm(tokens)
        times = self.clock.lap(there)
        skip = self._nonfinite.note(step, loss, row["grad_norm"], row["skipped"], int(metrics.skipped_in_row))
        for note in (skip, self._spikes.note(step, loss) if trained_tokens else None):
            if note:
                self._run.display.note(note)
        self.last_loss = loss if math.isfinite(loss) else self.last_loss
        if not last and step % self._run.config.train.log_every:
            return None
        speed = {"tokens_per_second": tokens / times.step, "mfu": self._utilisation(needed, times.step)}
        return row | speed | times.row() | device_memory(self._devices)

    def summary(self, point: Point) -> dict[str, Any]:
        """What is said of the machine: of the steps of this process."""
        self._compile_log.take(self._run.runner.compilation_log)
        total = self.clock.total
        return {
            "tokens_per_second": self._tokens / total.step if total.step else None,
            "mfu": self._utilisation(self._needed, total.step),
            "mfu_convention": CONVENTION,
            "mfu_palm": self._utilisation(self._palm, total.step),
            "flops_per_token": self._needed / self._tokens if self._needed else None,
            "flops_per_token_palm": None if self._flops is None else self._flops.palm(1),
            "peak_flops": self._peak,
            **total.row(),
            "other_compile_seconds": self._compile_log.other_seconds,
            "step_memory_bytes": self._planned,
            **peak_memory(self._devices),
        }

    def _utilisation(self, flops: float, seconds: float) -> float | None:
        return flops / seconds / self._peak if self._peak and seconds and flops else None
