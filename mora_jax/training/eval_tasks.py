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

KEY = "train.eval_tasks"


@dataclass(frozen=True)
class EvalTask:
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
        """The metrics of a model, under the names `eval_TASK_METRIC`."""
        found = run_task(self.task, self.examples, scorer, metrics=self.metrics, progress=progress).metrics
        return {f"eval_{self.task.name}_{name}": one.value for name, one in found.items()}


def read_tasks(named: Sequence[str], limit: int | None) -> tuple[EvalTask, ...]:
    """Reads the tasks of a run and makes their examples.

    Args:
        named: texts NAME=FILE.
        limit: takes the first so many rows of each; None: all.

    Raises:
        InputError: a text or a file isn't understood, or a task can't be evaluated here.
    """
    found: list[EvalTask] = []
    for text in named:
        name, file = split_task(text)
        task = load_task(name)
        if task.name in (other.task.name for other in found):
            raise InputError(f"{KEY} names task {task.name} twice")
        if task.type == "generate" and jax.process_count() > 1:
            raise InputError(f"{KEY}: task {task.name} generates answers, which runs of several processes don't do")
        examples = make_examples(task, read_rows(file, whole_texts=task.type == "text"), limit=limit)
        found.append(EvalTask(task, examples, metrics_of(task, examples)))
    return tuple(found)


def split_task(text: str) -> tuple[str, str]:
    """Name and file of a text NAME=FILE.

    Raises:
        InputError: it is none.
    """
    name, equals, file = text.partition("=")
    if not name or not file:
        raise InputError(f"{KEY}: {text!r} must be NAME=FILE, such as arc_easy=arc_easy.jsonl")
    return name, file
