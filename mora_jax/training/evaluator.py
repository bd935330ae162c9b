"""Scores held-out data in the course of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mora_jax.evaluation.loglikelihood import LoglikelihoodScorer
from mora_jax.evaluation.perplexity import score
from mora_jax.models.decoder import Decoder
from mora_jax.models.partitioning import Partitioner
from mora_jax.training.display.plain import Display
from mora_jax.training.distributed.signals import StopSignals
from mora_jax.training.observe.observer import Observer
from mora_jax.training.setup import Setup

#: Scores a model after so many steps, beside the loss: values by name.
Measure = Callable[[Decoder, int], dict[str, float]]


class _Interrupted(Exception):
    """A signal came during an evaluation."""


class Evaluator:
    """The evaluations of a run.

    Args:
        setup: of the run; without evaluation data and tasks none is ever due.
        observer: writes the row of each evaluation.
        display: shows it, and how far an evaluation is.
        call: called with the row.
        partitioner: how the model's arrays are laid over devices.
        measure: what else is scored in every evaluation; each value gets `eval_` before its name.

    Attributes:
        row: of the last evaluation; empty before the first.
        seconds: what each took, of this process.
        last_step: the run's, after which there is always one.
    """

    def __init__(
        self,
        setup: Setup,
        observer: Observer,
        display: Display,
        call: Callable[[dict[str, Any]], None],
        partitioner: Partitioner | None = None,
        measure: Measure | None = None,
    ):
        self._setup, self._observer, self._display = setup, observer, display
        self._call, self._partitioner, self._measure = call, partitioner, measure
        self.row: dict[str, Any] = {}
        self.seconds: list[float] = []
        self.last_step = setup.plan.steps

    def due(self, done: int) -> bool:
        """Whether there is an evaluation after so many steps."""
        settings = self._setup.config.train
        every = settings.eval_every
        due = done == self.last_step or bool(every and done % every == 0)
        return (due if done else settings.eval_on_start) and self._evaluates

    @property
    def _evaluates(self) -> bool:
        return self._setup.evaluates or self._measure is not None

    def owed(self, done: int) -> bool:
        """Whether the evaluation after so many steps was not made or not ended."""
        return self.due(done) and self.row.get("step") != done

    @property
    def of_tasks(self) -> dict[str, float]:
        """The metrics of tasks in the last evaluation, by name."""
        begins = tuple(f"eval_{task.task.name}_" for task in self._setup.tasks)
        return {name: value for name, value in self.row.items() if name.startswith(begins)}

    def loss_after(self, done: int) -> float | None:
        """The loss after so many steps, if it was evaluated then."""
        return self.row.get("eval_loss") if self.row.get("step") == done else None

    def __call__(self, model: Decoder, step: int, signals: StopSignals) -> None:
        """Scores the model after `step`, or doesn't get to the end of it: where a signal comes."""
        words = "evaluating"

        def progress(done: int, total: int) -> None:
            self._display.progress(words, done, total)
            if signals.look() and done < total:
                raise _Interrupted

        before, signals.words = signals.words, ("stopping this evaluation", "stop without saving")
        self._display.loading("evaluating")
        started = time.perf_counter()
        options: dict[str, Any] = {"batch_size": self._setup.micro_batch, "partitioner": self._partitioner}
        row: dict[str, Any] = {"step": step}
        try:
            if self._setup.evaluation is not None:
                scores = score(model, self._setup.evaluation, progress=progress, **options)
                row |= {"eval_loss": scores.nll, "eval_perplexity": scores.perplexity}
                row |= {"eval_accuracy": scores.accuracy, "eval_tokens": scores.tokens}
                row |= {"eval_prompt_loss": scores.prompt_nll}
            if self._setup.tasks:
                scorer = LoglikelihoodScorer(model, self._setup.tokenizer, **options)
            for task in self._setup.tasks:
                words = f"evaluating {task.task.name}"
                row |= task(scorer, progress)
            if self._measure is not None:
                row |= {f"eval_{name}": value for name, value in self._measure(model, step).items()}
        except _Interrupted:
            return
        finally:
            signals.words = before
        self.seconds.append(time.perf_counter() - started)
        self.row = row
        self._observer.write(self.row)
        self._display.evaluation(self.row)
        self._call(self.row)

    def seconds_left(self, step: int) -> float:
        """What the evaluations after `step` should take, by the mean of this process."""
        if not self._evaluates or not self.seconds:
            return 0.0
        steps, every = self._setup.plan.steps, self._setup.config.train.eval_every
        left = 1 + ((steps - 1) // every - step // every if every else 0)
        return left * sum(self.seconds) / len(self.seconds)
