"""Scores held-out data in the course of a run."""

import time
from collections.abc import Callable
from typing import Any

from mora_jax.data.preferences import PreferenceDataset
from mora_jax.evaluation.loglikelihood import LoglikelihoodScorer
from mora_jax.evaluation.perplexity import score
from mora_jax.evaluation.preferences import answer_scores, preference_metrics
from mora_jax.models.decoder import Decoder
from mora_jax.training.hooks import Hook, Point, Row, Run

#: Scores a model after so many steps, beside the loss: values by name.
Measure = Callable[[Decoder, int], dict[str, float]]


class _Interrupted(Exception):
    """A signal came during an evaluation."""


class Evaluator(Hook):
    """The evaluations of a run.

    Args:
        run: without evaluation data and tasks no evaluation is ever due.
        measure: what else is scored in every evaluation; each value gets `eval_` before its name.
    """

    def __init__(self, run: Run, measure: Measure | None = None):
        self._run, self._setup, self._measure = run, run.setup, measure
        self._evaluates = run.setup.evaluates or measure is not None
        self._row: Row = {}  # of the last evaluation
        self._seconds: list[float] = []  # what each took in this process

    def remember(self, row: Row) -> None:
        if any(name.startswith("eval_") for name in row):
            self._row = row

    def due(self, step: int, last: bool) -> bool:
        every = self._run.config.train.eval_every
        due = last or bool(every and step % every == 0)
        return (due if step else self._on_start) and self._evaluates

    @property
    def _on_start(self) -> bool:
        """Whether the base is scored before the first step: as asked for, else where that is cheap."""
        asked, setup = self._run.config.train.eval_on_start, self._setup
        rows = sum(len(task.examples) for task in setup.tasks)
        rows += 0 if setup.evaluation is None else len(setup.evaluation)
        trained = setup.plan.steps * setup.config.train.batch_size
        # Scoring a row takes a third of training on it, and what it compiles is needed at the end anyway.
        return rows <= trained / 4 and setup.evaluates if asked is None else asked

    def on_start(self, point: Point) -> Point:
        return self.on_pause(point._replace(last=point.step == self._setup.plan.steps))

    def on_pause(self, point: Point) -> Point:
        if not self.due(point.step, point.last) or self._row.get("step") == point.step:
            return point
        row = None if self._run.signals.received else self._scored(point)
        if row is None:
            return point._replace(owed="its evaluation")
        self._row = row
        return point._replace(evaluation=row)

    def _scored(self, point: Point) -> dict[str, Any] | None:
        """The row of an evaluation; None where a signal came before its end."""
        run, setup, title = self._run, self._setup, "evaluating"

        def progress(done: int, total: int) -> None:
            run.display.progress(title, done, total)
            if run.signals.look() and done < total:
                raise _Interrupted

        options: dict[str, Any] = {"batch_size": setup.micro_batch, "partitioner": run.assembly.settings.partitioner}
        before = run.signals.announce(("stopping this evaluation", "stop without saving"))
        run.display.loading("evaluating")
        started, model = time.perf_counter(), run.model(point)
        row: dict[str, Any] = {"step": point.step}
        try:
            if isinstance(setup.evaluation, PreferenceDataset):
                row |= self._of_preferences(model, setup.evaluation, progress=progress, **options)
            elif setup.evaluation is not None:
                scores = score(model, setup.evaluation, progress=progress, **options)
                row |= {"eval_loss": scores.nll, "eval_perplexity": scores.perplexity}
                if scores.nll_stderr is not None:
                    row["eval_loss_stderr"] = scores.nll_stderr
                row |= {"eval_accuracy": scores.accuracy, "eval_tokens": scores.tokens}
                row |= {"eval_prompt_loss": scores.prompt_nll}
            if setup.tasks:
                scorer = LoglikelihoodScorer(model, setup.tokenizer, **options)
            for task in setup.tasks:
                title = f"evaluating {task.task.name}"
                row |= task(scorer, progress)
            if self._measure is not None:
                row |= {f"eval_{name}": value for name, value in self._measure(model, point.step).items()}
        except _Interrupted:
            return None
        finally:
            run.signals.announce(before)
        self._seconds.append(time.perf_counter() - started)
        return row

    def _of_preferences(self, model: Decoder, dataset: PreferenceDataset, **options: Any) -> dict[str, float]:
        """Each metric of the objective, with its standard error beside it."""
        loss = self._run.config.loss
        assert loss.preference is not None, "preferences have an objective"
        scores = answer_scores(model, dataset, base=loss.reference == "base", **options)
        row = {}
        for name, estimate in preference_metrics(dataset, scores, loss.preference, loss.settings).items():
            row[f"eval_{name}"] = estimate.value
            if estimate.stderr is not None:
                row[f"eval_{name}_stderr"] = estimate.stderr
        return row

    def seconds_left(self, step: int) -> float:
        """What the evaluations after `step` should take, by the shortest of this process: the first compiles."""
        if not self._evaluates or not self._seconds:
            return 0.0
        steps, every = self._setup.plan.steps, self._run.config.train.eval_every
        left = 1 + ((steps - 1) // every - step // every if every else 0)
        return left * min(self._seconds)

    def summary(self, point: Point) -> dict[str, Any]:
        evaluation = self._setup.evaluation
        preferences = isinstance(evaluation, PreferenceDataset)
        others = ("eval_",) if preferences else tuple(f"eval_{task.task.name}_" for task in self._setup.tasks)
        return {
            "eval_loss": self._row.get("eval_loss"),
            "eval_loss_stderr": self._row.get("eval_loss_stderr"),
            "eval_perplexity": self._row.get("eval_perplexity"),
            "eval_data": None if evaluation is None else f"{evaluation.fingerprint()}{self._run.config.loss.scored}",
            **{name: value for name, value in self._row.items() if name.startswith(others)},
        }
