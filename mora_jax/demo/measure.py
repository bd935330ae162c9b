"""Measures a model for the table: answers to held-out questions, and perplexities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import nnx

from mora_jax.adapters.attach import adapted_layers
from mora_jax.adapters.merge import merge
from mora_jax.data import EncodedDataset, load_rows
from mora_jax.data.conversation import Conversation
from mora_jax.demo import corpus, data_path, instructions
from mora_jax.evaluation.chat import generate_batch
from mora_jax.evaluation.perplexity import score
from mora_jax.evaluation.qa_metrics import exact_match, mean_scores
from mora_jax.training.state import Structure, flat_arrays

MAX_NEW_TOKENS = 16
BASE_DOCUMENTS = 120
BATCH_SIZE = 120


@dataclass(frozen=True)
class Scores:
    """A model's figures.

    Attributes:
      exact_match, f1: means over the held-out questions, in [0, 1].
      by_task: exact match of each task.
      response_perplexity: of the held-out answers, given their questions.
      base_perplexity: of corpus text that the base model wasn't trained on.
      answers: what the model said, in the order of the questions.
    """

    exact_match: float
    f1: float
    by_task: dict[str, float]
    response_perplexity: float
    base_perplexity: float
    answers: tuple[str, ...]


class Judge:
    """Holds the held-out questions and texts; every model is judged by the same compiled functions."""

    def __init__(self, base: Any, tokenizer: Any, *, questions: int | None = None) -> None:
        """Takes the base model, whose structure every judged model is brought into.

        Args:
          base: the decoder without adapters.
          tokenizer: its tokenizer.
          questions: use only so many questions of each task; None: all.
        """
        self.tokenizer = tokenizer
        _train, held_out = instructions.build()
        count = questions or instructions.HELD_OUT_PER_TASK
        keep = [i for i in range(len(held_out)) if i % instructions.HELD_OUT_PER_TASK < count]
        rows = load_rows(data_path("held_out"))
        self.questions = [held_out[i] for i in keep]
        self.responses = EncodedDataset.build([rows[i] for i in keep], tokenizer, mode="masked")
        # The curves look at every second answer only, to save time.
        self.watched = EncodedDataset.build([rows[i] for i in keep[::2]], tokenizer, mode="masked")
        start = corpus.HELD_OUT_FROM
        texts = list(corpus.Corpus().documents(start, start + BASE_DOCUMENTS))
        self.texts = _plain_text(texts, tokenizer)
        graphdef, state = nnx.split(base)
        self._structure = Structure(graphdef, state)
        self._names = flat_arrays(state).keys()

    def plain(self, model: Any) -> Any:
        """The same weights in the structure of the base model; adapters of `model` are folded in."""
        if any(True for _ in adapted_layers(model)):
            merge(model)
        arrays = flat_arrays(nnx.state(model))
        return self._structure.model({name: arrays[name] for name in self._names})

    def response_loss(self, model: Any) -> float:
        """Mean negative log-likelihood of every second held-out answer, in nats a token."""
        return score(self.plain(model), self.watched, batch_size=BATCH_SIZE).nll

    def __call__(self, model: Any) -> Scores:
        """Measures everything."""
        model = self.plain(model)
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


def _plain_text(texts: list[str], tokenizer: Any) -> EncodedDataset:
    return EncodedDataset.build([Conversation(text=text) for text in texts], tokenizer, mode="full")
