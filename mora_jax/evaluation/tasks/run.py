"""Runs a task with a model: a record of each example, and the metrics of them all."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mora_jax.data.templates.render import render_prompt
from mora_jax.errors import InputError
from mora_jax.evaluation.chat import complete_batch, find_stop_ids
from mora_jax.evaluation.generate import Generator
from mora_jax.evaluation.loglikelihood import LoglikelihoodScorer
from mora_jax.evaluation.metrics.classification import confusion_matrix
from mora_jax.evaluation.metrics.estimate import Estimate, Record
from mora_jax.evaluation.tasks.examples import Example, make_examples, pairs_of, read_rows
from mora_jax.evaluation.tasks.metrics import METRICS, TaskMetric, metrics_of
from mora_jax.evaluation.tasks.task import Task, load_task

Progress = Callable[[int, int], None]
#: What a type of task finds out of an example; `skipped` is why it can't be scored.
Facts = dict[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """What came out.

    Attributes:
        task: its name.
        metrics: by name.
        records: of the examples, in the order of their rows; one that can't be scored has `skipped`, the reason.
        baselines: what needs no model: the share of the commonest answer, and of guessing; empty without choices.
        confusion: `labels`, and the `matrix` of which was taken for which (its last column: none); None without F1.
        notes: what a user should be told.
    """

    task: str
    metrics: Mapping[str, Estimate]
    records: Sequence[Record]
    baselines: Mapping[str, float]
    confusion: Mapping[str, Any] | None
    notes: Sequence[str] = ()

    @property
    def skipped(self) -> int:
        """How many examples are not scored."""
        return sum("skipped" in record for record in self.records)

    def to_dict(self) -> dict[str, Any]:
        """Task, number of examples and metrics with standard errors, ready for JSON."""
        metrics = {name: {"value": one.value, "stderr": one.stderr} for name, one in self.metrics.items()}
        content = {"task": self.task, "n": len(self.records) - self.skipped, "metrics": metrics}
        return content | ({"skipped": self.skipped} if self.skipped else {})


def run_task(
    task: Task,
    examples: Sequence[Example],
    scorer: LoglikelihoodScorer,
    *,
    metrics: Sequence[TaskMetric],
    progress: Progress | None = None,
) -> TaskResult:
    """Runs a task.

    Args:
        task: what is done with the examples.
        examples: at least one.
        scorer: the model, how many rows it takes at once, and where its arrays lie.
        metrics: as `metrics_of` gives them.
        progress: called with (done, all) after each batch.
    """
    # Records hold the type's own metrics too, so that another evaluation can be compared by these.
    recorded = [*metrics, *(one for one in METRICS if task.type in one.types and one.default and one not in metrics)]
    notes: list[str] = []
    if task.type == "generate":
        for metric in metrics:
            metric.values({"prediction": "", "truths": [""]})  # what isn't installed is told before
        facts = _generate(task, examples, scorer, notes, progress)
    elif task.type == "text":
        facts = _score_texts(examples, scorer, progress)
    else:
        facts = _score_choices(task, examples, scorer, notes, progress)
    records: list[Record] = []
    scored: list[tuple[Example, Record]] = []
    for example, fact in zip(examples, facts, strict=True):
        record = {"row": example.row, "id": example.id, **fact}
        if "skipped" not in record:
            for metric in recorded:
                record |= metric.values(record)
            scored.append((example, record))
        records.append(record)
    if left_out := len(records) - len(scored):
        first = next(f"{e.where}: {r['skipped']}" for e, r in zip(examples, records, strict=True) if "skipped" in r)
        if not scored:
            raise InputError(f"task {task.name}: no row can be scored; the first is {first}")
        notes.append(f"{left_out} of {len(records)} rows are not scored; the first is {first}")
    values = {metric.name: metric.metric([record for _, record in scored]) for metric in metrics}
    for name, one in values.items():
        if not np.isfinite(one.value):
            raise InputError(f"the model gives a {name} of {one.value} on task {task.name}; try --dtype float32")
    answers = [example.answer for example, _ in scored if example.answer is not None]
    baselines, confusion = {}, None
    if answers:
        chance = float(np.mean([1 / len(example.choices) for example, _ in scored]))
        baselines = {"majority": float(np.bincount(answers).max() / len(answers)), "chance": chance}
    if any(metric.same_choices for metric in metrics):
        labels = scored[0][0].choices
        matrix = confusion_matrix(answers, [record["prediction"] for _, record in scored], range(len(labels)))
        confusion = {"labels": list(labels), "matrix": matrix.tolist()}
    return TaskResult(task.name, values, records, baselines, confusion, notes)


def _score_choices(
    task: Task, examples: Sequence[Example], scorer: LoglikelihoodScorer, notes: list[str], progress: Progress | None
) -> Iterator[Facts]:
    pairs = [list(pairs_of(example, task)) for example in examples]
    encoded = iter(scorer.encode_pairs([pair for choices in pairs for pair in choices]))
    requests = [[next(encoded) for _ in choices] for choices in pairs]
    refusals = [next(filter(None, map(scorer.refusal, choices)), None) for choices in requests]
    sent = [
        request for choices, refusal in zip(requests, refusals, strict=True) for request in choices if refusal is None
    ]
    if cut := sum(len(context) + len(continuation) > scorer.max_length + 1 for context, continuation in sent):
        notes.append(f"{cut} of {len(sent)} inputs have more than {scorer.max_length} tokens and lose their beginning")
    scores = iter(scorer.score(sent, progress))
    for example, choices, refusal in zip(examples, requests, refusals, strict=True):
        if refusal is not None:
            yield {"skipped": refusal}
            continue
        scores_of_choices = [next(scores) for _ in choices]
        if example.answer is None:
            (score,) = scores_of_choices
            facts = {"target": example.choices[0], "nll": -score.logprob, "tokens": score.tokens}
            yield {"prompt": example.prompt, **facts, "correct": score.correct}
            continue
        logprobs = [score.logprob for score in scores_of_choices]
        yield {
            "prompt": example.prompt,
            "choices": list(example.choices),
            "answer": example.answer,
            "prediction": int(np.argmax(logprobs)),  # the first, where two are equal
            "loglikelihoods": logprobs,
            "choice_tokens": [score.tokens for score in scores_of_choices],
            **({"continuation": example.continuation} if task.type == "partial" else {}),
        }


def _score_texts(
    examples: Sequence[Example], scorer: LoglikelihoodScorer, progress: Progress | None
) -> Iterator[Facts]:
    texts = [example.prompt for example in examples]
    for text, score in zip(texts, scorer.loglikelihood_rolling(texts, progress), strict=True):
        if not score.tokens:
            yield {"skipped": "the text has no tokens"}
            continue
        words = len(re.split(r"\s+", text))  # as the harness counts, which counts the ends
        facts = {"nll": -score.logprob, "tokens": score.tokens, "correct": score.correct}
        yield {**facts, "words": words, "bytes": len(text.encode())}


def _generate(
    task: Task, examples: Sequence[Example], scorer: LoglikelihoodScorer, notes: list[str], progress: Progress | None
) -> Iterator[Facts]:
    model, tokenizer = scorer.model, scorer.tokenizer
    stops = find_stop_ids(model, tokenizer) | _stop_tokens(tokenizer, model.config.vocab_size, task.stop)
    if task.chat:
        prompts = [render_prompt(tokenizer, _messages(example)).input_ids.tolist() for example in examples]
    else:
        prompts = scorer.encode([example.prompt for example in examples])
    most = min(task.max_new_tokens, max(1, scorer.max_length // 2))
    room = scorer.max_length - most
    if cut := sum(len(prompt) > room for prompt in prompts):
        notes.append(f"{cut} of {len(prompts)} prompts have more than {room} tokens and lose their beginning")
    answers = complete_batch(
        Generator(model, stops),
        [prompt[-room:] for prompt in prompts],
        max_new_tokens=most,
        batch_size=scorer.batch_size,
        progress=progress,
    )
    for example, tokens in zip(examples, answers, strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [end for stop in task.stop if (end := text.find(stop)) >= 0]
        answer = text[: min(ends)] if ends else text
        facts = {"prompt": example.prompt, "truths": list(example.truths), "prediction": answer.strip()}
        yield {**facts, "cut_off": int(len(tokens) == most and not ends)}


def _messages(example: Example) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": role, "content": text} for turn in example.turns for role, text in zip(roles, turn, strict=True)]
    return [*turns, {"role": "user", "content": example.prompt}]


def _stop_tokens(tokenizer: Any, count: int, stop: Sequence[str]) -> set[int]:
    """Tokens whose text begins with one of the stops, so that generation ends there and nothing is lost."""
    if not stop:
        return set()
    known = range(min(count, len(tokenizer)))
    texts = tokenizer.backend_tokenizer.decode_batch([[token] for token in known], skip_special_tokens=False)
    return {token for token, text in zip(known, texts, strict=True) if text.startswith(tuple(stop))}


@dataclass(frozen=True)
class NamedTask:
    """A task with its examples, which is evaluated in the course of a run as `mora-jax eval --task` does afterwards.

    Attributes:
        task: what is done with them.
        examples: at least one.
        metrics: those of the task.
    """

    task: Task
    examples: Sequence[Example]
    metrics: Sequence[TaskMetric]

    def __call__(self, scorer: LoglikelihoodScorer, progress: Progress) -> dict[str, float]:
        """The metrics of a model, under the names `eval_TASK_METRIC`, and how many rows it doesn't score, if any."""
        result = run_task(self.task, self.examples, scorer, metrics=self.metrics, progress=progress)
        values: dict[str, float] = {name: one.value for name, one in result.metrics.items()}
        values |= {"skipped": result.skipped} if result.skipped else {}
        return {f"eval_{self.task.name}_{name}": value for name, value in values.items()}


def read_tasks(texts: Sequence[str], origin: str, limit: int | None) -> tuple[NamedTask, ...]:
    """Reads the tasks of a run and makes their examples.

    Args:
        texts: of the form NAME=FILE.
        origin: where they stand, for messages.
        limit: takes the first so many rows of each; None: all.

    Raises:
        InputError: a text or a file isn't understood, or a task can't be evaluated here.
    """
    tasks: list[NamedTask] = []
    for text in texts:
        name, _, file = text.partition("=")
        if not name or not file:
            raise InputError(f"{origin}: {text!r} must be NAME=FILE, such as arc_easy=arc_easy.jsonl")
        task = load_task(name)
        if task.name in (other.task.name for other in tasks):
            raise InputError(f"{origin} names task {task.name} twice")
        if task.type == "generate" and jax.process_count() > 1:
            raise InputError(f"{origin}: task {task.name} generates answers, which runs of several processes don't do")
        examples = make_examples(task, read_rows(file, whole_texts=task.type == "text"), limit=limit)
        tasks.append(NamedTask(task, examples, metrics_of(task, examples)))
    return tuple(tasks)
