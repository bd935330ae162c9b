"""The cells of the demo's table: one method and one loss mode each, trained from the same start, and measured alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from mora_jax.adapters.config import FullConfig, LoRAConfig, MoRAConfig
from mora_jax.adapters.merge import merge
from mora_jax.adapters.sites import adapted_sites
from mora_jax.data import EncodedDataset, load_rows
from mora_jax.demo import TEXTS, model_path
from mora_jax.demo.answers import exact_match, mean_scores
from mora_jax.evaluation.chat import generate_batch
from mora_jax.evaluation.perplexity import score
from mora_jax.training.display import RunInfo, Silent
from mora_jax.training.finetune import FinetuneResult, finetune
from mora_jax.training.state import Structure, flat_arrays

RANK = 8
BATCH_SIZE = 32
#: Tokens; no question with its answer has more.
MAX_LENGTH = 32
WATCH_EVERY = 30
MODES = ("masked", "unmasked")
MAX_NEW_TOKENS = 16
#: Questions and texts that are scored at once.
_SCORED = 120


@dataclass(frozen=True)
class Method:
    """A way to fine-tune, and the rate, of four a factor of 2 apart, with the least validation loss of both modes."""

    name: str
    config: Any
    learning_rate: float


# LoRA and MoRA of the same rank: MoRA's square matrix holds about as many numbers as LoRA's two.
METHODS = (
    Method("LoRA", LoRAConfig(rank=RANK, alpha=2.0 * RANK), 8e-3),
    Method("MoRA sharing", MoRAConfig(rank=RANK, kind="sharing"), 6e-3),
    Method("MoRA rotation", MoRAConfig(rank=RANK, kind="rotation"), 6e-3),
    Method("full", FullConfig(), 2e-3),
)


#: Told the steps of a cell that are done, and what is going on.
Watch = Callable[[int, str], None]


class _Watched(Silent):
    """A display that shows nothing itself, but tells how far the run is."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch, self._step = watch, 0

    def loading(self, words: str) -> None:
        """Before the first step, or between two."""
        self._watch(self._step, words)

    def start(self, info: RunInfo) -> None:
        """The first step is compiled next."""
        self._watch(0, "compiling")

    def step(self, row: Mapping[str, Any]) -> None:
        """A step was logged."""
        self._step = row["step"]
        self._watch(self._step, "training")

    def progress(self, words: str, done: int, total: int) -> None:
        """How far something between steps is."""
        self._watch(self._step, words)


def train_cell(
    method: Method,
    mode: str,
    rows: Sequence[dict[str, Any]],
    held_out: Sequence[dict[str, Any]],
    *,
    steps: int,
    seed: int,
    watch: Watch = lambda step, words: None,
) -> FinetuneResult:
    """Fine-tunes the embedded model.

    Args:
      method: what is trained.
      mode: the loss mode.
      rows: chat messages to train on.
      held_out: chat messages for validation, whose answers are scored every `WATCH_EVERY` steps and at the end.
      steps: optimiser steps.
      seed: of initial adapters and of the order of the data.
      watch: told the steps done, and what is going on.

    Raises:
      KeyboardInterrupt: the training was stopped.
    """
    result = finetune(
        model_path(),
        rows,
        method.config,
        loss=mode,
        eval_rows=held_out,
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=method.learning_rate,
        config={
            "seed": seed,
            "model.dtype": "float32",
            "data.max_length": MAX_LENGTH,
            "optimizer.warmup_steps": min(10, steps),
            "train.eval_every": WATCH_EVERY,
            "train.eval_on_start": False,  # the base is scored once for all cells
            "mesh.data": 1,
        },
        display=_Watched(watch),
    )
    if result.interrupted:
        raise KeyboardInterrupt
    return result


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
        self._tokenizer, self._rows = tokenizer, rows
        self._texts = EncodedDataset.build(load_rows(TEXTS), tokenizer, mode="full")
        graphdef, state = nnx.split(base)
        self._structure = Structure(graphdef, state)
        self._names = flat_arrays(state).keys()

    def perplexity(self, model: Any, rows: Sequence[dict[str, Any]]) -> float:
        """Of the answers of rows."""
        answers = EncodedDataset.build(load_rows(rows), self._tokenizer, mode="masked", max_length=MAX_LENGTH)
        return score(self._plain(model), answers, batch_size=_SCORED).perplexity

    def _plain(self, model: Any) -> Any:
        """The same weights in the structure of the base model; adapters of `model` are folded in."""
        if adapted_sites(model):
            merge(model)
        arrays = flat_arrays(nnx.state(model))
        return self._structure.model({name: arrays[name] for name in self._names})

    def __call__(self, model: Any) -> Scores:
        """Measures a model, whose adapters are merged."""
        model = self._plain(model)
        questions, truths = ([row["messages"][turn]["content"] for row in self._rows] for turn in (0, 1))
        options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": _SCORED}
        answers = generate_batch(model, self._tokenizer, questions, **options)
        exact, f1 = mean_scores(answers, truths)
        by_task: dict[str, list[float]] = {}
        for row, answer, truth in zip(self._rows, answers, truths, strict=True):
            by_task.setdefault(row["task"], []).append(exact_match(answer, truth))
        return Scores(
            exact_match=exact,
            f1=f1,
            by_task={task: sum(hits) / len(hits) for task, hits in by_task.items()},
            response_perplexity=self.perplexity(model, self._rows),
            base_perplexity=score(model, self._texts, batch_size=_SCORED).perplexity,
            answers=tuple(answer.strip() for answer in answers),
        )
