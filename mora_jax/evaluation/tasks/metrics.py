"""The metrics of tasks: each is one object, with the types of task that have it and what it needs of an example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mora_jax.errors import InputError
from mora_jax.evaluation.metrics import answers
from mora_jax.evaluation.metrics.classification import F1
from mora_jax.evaluation.metrics.estimate import Mean, Metric, Ratio, Record
from mora_jax.evaluation.tasks.examples import Example
from mora_jax.evaluation.tasks.task import Task

Values = Callable[[Record], dict[str, Any]]


@dataclass(frozen=True)
class TaskMetric:
    """A metric of tasks.

    Attributes:
        metric: over records.
        types: of tasks that can have it.
        values: what it adds to the record of an example, read from what is there.
        default: whether these tasks have it where no others are asked for.
        same_choices: whether all rows must have the same choices, as labels have.
    """

    metric: Metric
    types: tuple[str, ...]
    values: Values = lambda record: {}
    default: bool = True
    same_choices: bool = False

    @property
    def name(self) -> str:
        """What it is called."""
        return self.metric.name


def _mean(name: str, type_: str, value: Callable[[Record], float], **more: Any) -> TaskMetric:
    """The mean of a value of the record."""
    return TaskMetric(Mean(name), (type_,), lambda record: {name: value(record)}, **more)


def _likeliest_is_right(size: Callable[[str, int], int]) -> Callable[[Record], int]:
    """Whether the right choice has the largest log-likelihood by `size` of its text and its number of tokens."""

    def right(record: Record) -> int:
        sizes = [max(size(*choice), 1) for choice in zip(record["choices"], record["choice_tokens"], strict=True)]
        return int((np.array(record["loglikelihoods"]) / sizes).argmax() == record["answer"])

    return right


def _generated(name: str, check: Callable[[str, Sequence[str]], float], **more: Any) -> TaskMetric:
    """The mean of a check of generated answers against the right ones; a question without any has the answer ""."""
    return _mean(name, "generate", lambda record: check(record["prediction"], record["truths"] or [""]), **more)


def _gsm8k(name: str, number_in: Callable[[str], str | None]) -> TaskMetric:
    """Whether the number in an answer is that of a right one; the number stays in the record."""

    def values(record: Record) -> dict[str, Any]:
        number, truths = number_in(record["prediction"]), {answers.gsm8k_truth(truth) for truth in record["truths"]}
        return {name: number, f"{name}_match": int(number in truths)}

    return TaskMetric(Mean(f"{name}_match"), ("generate",), values, default=False)


def _f1(record: Record) -> float:
    truths = record["truths"]
    return answers.squad_f1(record["prediction"], truths or [""], empty_is_correct=not truths)


METRICS = (
    _mean("acc", "multiple_choice", _likeliest_is_right(lambda text, tokens: 1)),
    _mean("acc_norm", "multiple_choice", _likeliest_is_right(lambda text, tokens: len(text))),
    _mean("acc_bytes", "multiple_choice", _likeliest_is_right(lambda text, tokens: len(text.encode()))),
    _mean("acc_token", "multiple_choice", _likeliest_is_right(lambda text, tokens: tokens)),
    *(TaskMetric(metric, ("multiple_choice",), default=False, same_choices=True) for metric in F1),
    _mean("acc", "partial", _likeliest_is_right(lambda text, tokens: 1)),
    _mean("acc", "continuation", lambda record: int(record["correct"] == record["tokens"])),
    TaskMetric(Ratio("perplexity", "nll", None, "exp"), ("continuation",)),
    TaskMetric(Ratio("token_perplexity", "nll", "tokens", "exp"), ("continuation", "text")),
    TaskMetric(Ratio("word_perplexity", "nll", "words", "exp"), ("text",)),
    TaskMetric(Ratio("byte_perplexity", "nll", "bytes", "exp"), ("text",)),
    TaskMetric(Ratio("bits_per_byte", "nll", "bytes", "bits"), ("text",)),
    TaskMetric(Ratio("token_accuracy", "correct", "tokens"), ("continuation", "text")),
    _generated("exact_match", answers.squad_exact_match),
    _mean("f1", "generate", _f1),
    TaskMetric(Mean("cut_off"), ("generate",)),
    _gsm8k("strict", answers.gsm8k_strict),
    _gsm8k("flexible", answers.gsm8k_flexible),
    _generated("unparsed", lambda answer, _: int(answers.gsm8k_flexible(answer) is None), default=False),
    TaskMetric(
        answers.BLEU,
        ("generate",),
        lambda record: {"bleu_statistics": answers.bleu_statistics(record["prediction"], record["truths"] or [""])},
        default=False,
    ),
    *(_generated(name, lambda *given, name=name: answers.rouge(*given)[name], default=False) for name in answers.ROUGE),
)


def metrics_of(task: Task, examples: Sequence[Example], names: Sequence[str] = ()) -> list[TaskMetric]:
    """The metrics of a task.

    Args:
        task: names its own.
        examples: all of it.
        names: in place of these.

    Raises:
        InputError: one doesn't fit the task.
    """
    fitting = {metric.name: metric for metric in METRICS if task.type in metric.types}
    names = names or task.metrics or [name for name, metric in fitting.items() if metric.default]
    if unknown := [name for name in names if name not in fitting]:
        raise InputError(
            f"task {task.name} can't have the metric {', '.join(unknown)}; those of a {task.type} task are "
            f"{', '.join(fitting)}"
        )
    chosen = [fitting[name] for name in dict.fromkeys(names)]
    wrong = next((metric.name for metric in chosen if metric.same_choices), None)
    if wrong is not None and len({example.choices for example in examples}) > 1:
        others = ", ".join(name for name, metric in fitting.items() if not metric.same_choices)
        raise InputError(
            f"task {task.name} can't have the metric {wrong}: it needs the same choices in every row, as labels have; "
            f"take of {others}"
        )
    return chosen
