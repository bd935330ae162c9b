"""Runs a task with a model: a record of each example, and the metrics of them all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mora_jax.data.templates.render import render_prompt
from mora_jax.errors import InputError
from mora_jax.evaluation.chat import complete_batch, find_stop_ids
from mora_jax.evaluation.generate import Generator
from mora_jax.evaluation.loglikelihood import Loglikelihood, LoglikelihoodScorer
from mora_jax.evaluation.metrics.answers import (
    gsm8k_flexible,
    gsm8k_strict,
    gsm8k_truth,
    squad_exact_match,
    squad_f1,
)
from mora_jax.evaluation.metrics.classification import KINDS, confusion_matrix, f1_metric
from mora_jax.evaluation.metrics.estimate import Estimate, Mean, Metric, Ratio, Record
from mora_jax.evaluation.metrics.overlap import BLEU, ROUGE, bleu_statistics, rouge
from mora_jax.evaluation.tasks.examples import Example, pairs_of
from mora_jax.evaluation.tasks.task import Task

Progress = Callable[[int, int], None]
Records = Sequence[Record]

#: Metrics by type of task: those that are computed unless others are asked for, and the others.
METRICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "multiple_choice": (("acc", "acc_norm", "acc_bytes", "acc_token"), KINDS),
    "partial": (("acc",), ()),
    "continuation": (("acc", "perplexity", "token_perplexity", "token_accuracy"), ()),
    "text": (("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "token_accuracy"), ()),
    "generate": (
        ("exact_match", "f1", "cut_off"),
        ("strict_match", "flexible_match", "unparsed", "bleu", *ROUGE),
    ),
}
_RATIOS: dict[str, Metric] = {
    "perplexity": Ratio("perplexity", "nll", None, "exp"),
    "token_perplexity": Ratio("token_perplexity", "nll", "tokens", "exp"),
    "word_perplexity": Ratio("word_perplexity", "nll", "words", "exp"),
    "byte_perplexity": Ratio("byte_perplexity", "nll", "bytes", "exp"),
    "bits_per_byte": Ratio("bits_per_byte", "nll", "bytes", "bits"),
    "token_accuracy": Ratio("token_accuracy", "correct", "tokens"),
    "bleu": BLEU,
}


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
    records: Records
    baselines: Mapping[str, float]
    confusion: Mapping[str, Any] | None
    notes: Sequence[str] = ()

    @property
    def scored(self) -> list[Record]:
        """The records of the examples that are scored."""
        return scored(self.records)

    def to_dict(self) -> dict[str, Any]:
        """Task, number of examples and metrics with standard errors, ready for JSON."""
        metrics = {name: {"value": one.value, "stderr": one.stderr} for name, one in self.metrics.items()}
        left_out = len(self.records) - len(self.scored)
        return {"task": self.task, "n": len(self.scored), "metrics": metrics} | (
            {"skipped": left_out} if left_out else {}
        )


def metrics_of(task: Task, examples: Sequence[Example], names: Sequence[str] = ()) -> list[Metric]:
    """The metrics of a task.

    Args:
        task: names its own.
        examples: all of it.
        names: in place of these.

    Raises:
        InputError: one doesn't fit the task.
    """
    own, others = METRICS[task.type]
    chosen = tuple(dict.fromkeys(names or task.metrics or own))
    if unknown := [name for name in chosen if name not in (*own, *others)]:
        raise InputError(
            f"task {task.name} can't have the metric {', '.join(unknown)}; those of a {task.type} task are "
            f"{', '.join((*own, *others))}"
        )
    if any(name in KINDS for name in chosen) and len({example.choices for example in examples}) > 1:
        fitting = ", ".join(name for name in own if name not in KINDS)
        wrong = next(name for name in chosen if name in KINDS)
        raise InputError(
            f"task {task.name} can't have the metric {wrong}: it needs the same choices in every row, as labels have; "
            f"take of {fitting}"
        )
    labels = len(examples[0].choices)
    found: dict[str, Metric] = {**_RATIOS, **{kind: f1_metric(kind, labels) for kind in KINDS}}
    return [found.get(name, Mean(name)) for name in chosen]


def run_task(
    task: Task,
    examples: Sequence[Example],
    scorer: LoglikelihoodScorer,
    *,
    metrics: Sequence[Metric],
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
    names, notes = [metric.name for metric in metrics], list[str]()
    match task.type:
        case "generate":
            records = _generate(task, examples, scorer, names, notes, progress)
        case "text":
            scores = scorer.loglikelihood_rolling([example.prompt for example in examples], progress)
            records = [_text_record(example, score) for example, score in zip(examples, scores, strict=True)]
        case _:
            records = _score_choices(task, examples, scorer, notes, progress)
    counted = scored(records)
    if left_out := len(records) - len(counted):
        reason = next(f"{e.where}: {r['skipped']}" for e, r in zip(examples, records, strict=True) if "skipped" in r)
        if not counted:
            raise InputError(f"task {task.name}: no row can be scored; the first is {reason}")
        notes.append(f"{left_out} of {len(records)} rows are not scored; the first is {reason}")
    found = {metric.name: metric(counted) for metric in metrics}
    for name, one in found.items():
        if not np.isfinite(one.value):
            raise InputError(f"the model gives a {name} of {one.value} on task {task.name}; try --dtype float32")
    examples = [example for example, record in zip(examples, records, strict=True) if "skipped" not in record]
    answers = [example.answer for example in examples if example.answer is not None]
    baselines = {}
    if answers:
        chance = float(np.mean([1 / len(example.choices) for example in examples]))
        baselines = {"majority": float(np.bincount(answers).max() / len(answers)), "chance": chance}
    confusion = None
    if set(names) & set(KINDS):
        predictions = [record["prediction"] for record in counted]
        labels = examples[0].choices
        matrix = confusion_matrix(answers, predictions, range(len(labels)))
        confusion = {"labels": list(labels), "matrix": matrix.tolist()}
    return TaskResult(task.name, found, records, baselines, confusion, notes)


def scored(records: Sequence[Record]) -> list[Record]:
    """The records of examples that are scored."""
    return [record for record in records if "skipped" not in record]


def _score_choices(
    task: Task, examples: Sequence[Example], scorer: LoglikelihoodScorer, notes: list[str], progress: Progress | None
) -> Records:
    pairs = [list(pairs_of(example, task)) for example in examples]
    encoded = iter(scorer.encode_pairs([pair for choices in pairs for pair in choices]))
    requests = [[next(encoded) for _ in choices] for choices in pairs]
    refusals = [next(filter(None, map(scorer.refusal, choices)), None) for choices in requests]
    sent = [
        request for choices, refusal in zip(requests, refusals, strict=True) for request in choices if refusal is None
    ]
    cut = sum(len(context) + len(continuation) > scorer.max_length + 1 for context, continuation in sent)
    if cut:
        notes.append(f"{cut} of {len(sent)} inputs have more than {scorer.max_length} tokens and lose their beginning")
    scores = iter(scorer.score(sent, progress))
    records: list[Record] = []
    for example, choices, refusal in zip(examples, requests, refusals, strict=True):
        if refusal is not None:
            records.append(_skipped(example, refusal))
            continue
        found = [next(scores) for _ in choices]
        records.append(
            _continuation_record(example, found[0]) if example.answer is None else _choice_record(task, example, found)
        )
    return records


def _skipped(example: Example, reason: str) -> dict[str, Any]:
    return {"row": example.row, "id": example.id, "skipped": reason}


def _continuation_record(example: Example, score: Loglikelihood) -> dict[str, Any]:
    return {
        **_base(example),
        "target": example.choices[0],
        "nll": -score.logprob,
        "tokens": score.tokens,
        "correct": score.correct,
        "acc": int(score.is_greedy),
    }


def _choice_record(task: Task, example: Example, scores: Sequence[Loglikelihood]) -> dict[str, Any]:
    logprobs = np.array([score.logprob for score in scores])
    record = {
        **_base(example),
        "choices": list(example.choices),
        "answer": example.answer,
        "prediction": int(logprobs.argmax()),  # the first, where two are equal
        "loglikelihoods": logprobs.tolist(),
    }
    if task.type == "partial":
        return {**record, "continuation": example.continuation, "acc": int(record["prediction"] == example.answer)}
    sizes = {
        "acc": [1] * len(scores),
        "acc_norm": [len(choice) for choice in example.choices],
        "acc_bytes": [len(choice.encode()) for choice in example.choices],
        "acc_token": [score.tokens for score in scores],
    }
    for name, size in sizes.items():
        record[name] = int((logprobs / np.maximum(size, 1)).argmax() == example.answer)
    return record


def _text_record(example: Example, score: Loglikelihood) -> dict[str, Any]:
    text = example.prompt
    if not score.tokens:
        return _skipped(example, "the text has no tokens")
    return {
        "row": example.row,
        "id": example.id,
        "nll": -score.logprob,
        "tokens": score.tokens,
        "correct": score.correct,
        "words": len(re.split(r"\s+", text)),  # as the harness counts, which counts the ends
        "bytes": len(text.encode()),
    }


def _generate(
    task: Task,
    examples: Sequence[Example],
    scorer: LoglikelihoodScorer,
    names: Sequence[str],
    notes: list[str],
    progress: Progress | None,
) -> Records:
    if "bleu" in names:
        bleu_statistics("", [""])  # refused before anything is generated
    if set(names) & set(ROUGE):
        rouge("", [""])
    model, tokenizer = scorer.model, scorer.tokenizer
    stops = find_stop_ids(model, tokenizer) | _stop_tokens(tokenizer, model.config.vocab_size, task.stop)
    prompts: list[Any]
    if task.chat:
        prompts = [render_prompt(tokenizer, _messages(example)).input_ids for example in examples]
    else:
        prompts = scorer.encode([example.prompt for example in examples])
    context = model.config.max_positions
    made = min(task.max_new_tokens, max(1, context // 2))
    if cut := sum(len(prompt) > context - made for prompt in prompts):
        notes.append(f"{cut} of {len(prompts)} prompts have more than {context - made} tokens and lose their beginning")
    prompts = [prompt[-(context - made) :] for prompt in prompts]
    found = complete_batch(
        Generator(model, stops), prompts, max_new_tokens=made, batch_size=scorer.batch_size, progress=progress
    )
    records: list[Record] = []
    for example, tokens in zip(examples, found, strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [end for stop in task.stop if (end := text.find(stop)) >= 0]
        answer = text[: min(ends)] if ends else text
        cut_off = int(len(tokens) == made and not ends)
        records.append({**_base(example), **_checked(answer.strip(), example.truths, names), "cut_off": cut_off})
    return records


def _checked(answer: str, truths: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"truths": list(truths), "prediction": answer}
    record["exact_match"] = squad_exact_match(answer, truths or [""])
    record["f1"] = squad_f1(answer, truths or [""], empty_is_correct=not truths)
    if {"strict_match", "flexible_match", "unparsed"} & set(names):
        right = {gsm8k_truth(truth) for truth in truths}
        strict, flexible = gsm8k_strict(answer), gsm8k_flexible(answer)
        record |= {"strict": strict, "flexible": flexible, "unparsed": int(flexible is None)}
        record |= {"strict_match": int(strict in right), "flexible_match": int(flexible in right)}
    if "bleu" in names:
        record["bleu_statistics"] = bleu_statistics(answer, truths or [""])
    if set(names) & set(ROUGE):
        record |= rouge(answer, truths or [""])
    return record


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


def _base(example: Example) -> dict[str, Any]:
    return {"row": example.row, "id": example.id, "prompt": example.prompt}
