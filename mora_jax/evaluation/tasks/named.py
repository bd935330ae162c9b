"""Tasks that are evaluated in the course of a run, as `mora-jax eval --task` evaluates them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from mora_jax.errors import InputError
from mora_jax.evaluation.loglikelihood import LoglikelihoodScorer
from mora_jax.evaluation.metrics.estimate import Metric
from mora_jax.evaluation.tasks.examples import Example, make_examples, read_rows
from mora_jax.evaluation.tasks.run import metrics_of, run_task
from mora_jax.evaluation.tasks.task import Task, load_task


@dataclass(frozen=True)
class NamedTask:
    """A task with its examples.

    Attributes:
        task: what is done with them.
        examples: at least one.
        metrics: those of the task.
    """

    task: Task
    examples: Sequence[Example]
    metrics: Sequence[Metric]

    def __call__(self, scorer: LoglikelihoodScorer, progress: Callable[[int, int], None]) -> dict[str, float]:
        """The metrics of a model, under the names `eval_TASK_METRIC`, and how many rows it doesn't score, if any."""
        result = run_task(self.task, self.examples, scorer, metrics=self.metrics, progress=progress)
        values: dict[str, float] = {name: one.value for name, one in result.metrics.items()}
        if skipped := len(result.records) - len(result.scored):
            values["skipped"] = skipped
        return {f"eval_{self.task.name}_{name}": value for name, value in values.items()}


def read_tasks(named: Sequence[str], origin: str, limit: int | None) -> tuple[NamedTask, ...]:
    """Reads the tasks of a run and makes their examples.

    Args:
        named: texts NAME=FILE.
        origin: where they stand, for messages.
        limit: takes the first so many rows of each; None: all.

    Raises:
        InputError: a text or a file isn't understood, or a task can't be evaluated here.
    """
    found: list[NamedTask] = []
    for text in named:
        name, file = split_task(text, origin)
        task = load_task(name)
        if task.name in (other.task.name for other in found):
            raise InputError(f"{origin} names task {task.name} twice")
        if task.type == "generate" and jax.process_count() > 1:
            raise InputError(f"{origin}: task {task.name} generates answers, which runs of several processes don't do")
        examples = make_examples(task, read_rows(file, whole_texts=task.type == "text"), limit=limit)
        found.append(NamedTask(task, examples, metrics_of(task, examples)))
    return tuple(found)


def split_task(text: str, origin: str) -> tuple[str, str]:
    """Name and file of a text NAME=FILE.

    Raises:
        InputError: it is none.
    """
    name, equals, file = text.partition("=")
    if not name or not file:
        raise InputError(f"{origin}: {text!r} must be NAME=FILE, such as arc_easy=arc_easy.jsonl")
    return name, file
