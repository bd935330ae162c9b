"""Measures a model for the table: answers to the test questions, and perplexities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from mora_jax.adapters.attach import adapted_layers
from mora_jax.adapters.merge import merge
from mora_jax.data import EncodedDataset, load_rows
from mora_jax.demo import TEXTS
from mora_jax.demo.answers import exact_match, mean_scores
from mora_jax.demo.cells import MAX_LENGTH
from mora_jax.evaluation.chat import generate_batch
from mora_jax.evaluation.perplexity import score
from mora_jax.training.state import Structure, flat_arrays

MAX_NEW_TOKENS = 16
BATCH_SIZE = 120


@dataclass(frozen=True)
class Question:
    """One question of the instruction set, with the one right answer to it."""

    task: str
    instruction: str
    output: str

    @classmethod
    def of(cls, row: dict[str, Any]) -> Question:
        """Reads a row of the data files."""
        return cls(row["task"], *(message["content"] for message in row["messages"]))


@dataclass(frozen=True)
class Scores:
    """A model's figures.

    Attributes:
      exact_match, f1: means over the test questions, in [0, 1].
      by_task: exact match of each task.
      response_perplexity: of the right answers, given their questions.
      base_perplexity: of text like that of the base model's pretraining, which wasn't part of it.
      answers: what the model said, in the order of the questions.
    """

    exact_match: float
    f1: float
    by_task: dict[str, float]
    response_perplexity: float
    base_perplexity: float
    answers: tuple[str, ...]


class Judge:
    """Holds test questions and held-out texts; every model is judged by the same compiled functions."""

    def __init__(self, base: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> None:
        """Takes what the models are judged by.

        Args:
          base: the decoder without adapters, into whose structure every judged model is brought.
          tokenizer: its tokenizer.
          rows: test questions with the right answers.
        """
        self.tokenizer, self.questions = tokenizer, [Question.of(row) for row in rows]
        self.responses = self._responses(rows)
        self.texts = EncodedDataset.build(load_rows(TEXTS), tokenizer, mode="full")
        graphdef, state = nnx.split(base)
        self._structure = Structure(graphdef, state)
        self._names = flat_arrays(state).keys()

    def _responses(self, rows: Sequence[dict[str, Any]]) -> EncodedDataset:
        return EncodedDataset.build(load_rows(rows), self.tokenizer, mode="masked", max_length=MAX_LENGTH)

    def perplexity(self, model: Any, rows: Sequence[dict[str, Any]]) -> float:
        """Of the answers of other rows."""
        return score(self._plain(model), self._responses(rows), batch_size=BATCH_SIZE).perplexity

    def _plain(self, model: Any) -> Any:
        """The same weights in the structure of the base model; adapters of `model` are folded in."""
        if any(True for _ in adapted_layers(model)):
            merge(model)
        arrays = flat_arrays(nnx.state(model))
        return self._structure.model({name: arrays[name] for name in self._names})

    def __call__(self, model: Any) -> Scores:
        """Measures a model, whose adapters are merged."""
        model = self._plain(model)
        answers = generate_batch(
            model,
            self.tokenizer,
            [question.instruction for question in self.questions],
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=BATCH_SIZE,
        )
        truths = [question.output for question in self.questions]
        exact, f1 = mean_scores(answers, truths)
        by_task: dict[str, list[float]] = {}
        for question, answer in zip(self.questions, answers, strict=True):
            by_task.setdefault(question.task, []).append(exact_match(answer, question.output))
        return Scores(
            exact_match=exact,
            f1=f1,
            by_task={task: sum(hits) / len(hits) for task, hits in by_task.items()},
            response_perplexity=score(model, self.responses, batch_size=BATCH_SIZE).perplexity,
            base_perplexity=score(model, self.texts, batch_size=BATCH_SIZE).perplexity,
            answers=tuple(answer.strip() for answer in answers),
        )
