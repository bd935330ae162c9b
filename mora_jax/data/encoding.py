"""Conversations to examples: tokens, segments and the weight of predicting each token, cut to length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from mora_jax.data.conversation import Conversation
from mora_jax.data.rendering import Renderer
from mora_jax.data.segments import RESPONSE
from mora_jax.data.tokens import Tokens, tokenize
from mora_jax.data.weights import token_weights, weight_table
from mora_jax.errors import InputError

#: What happens to a row that is longer than `max_length`: its end is cut off, or it is left out.
TRUNCATIONS = ("right", "drop")

#: Why a row is left out, in words.
CAUSES = {
    "too_long": "longer than max_length",
    "answer_cut_off": "nothing trained within max_length",
    "no_answer": "no answer to train on",
    "no_weight": "no token with a weight",
}

# Rows that are handed to the tokenizer at once: enough to use every core, little enough to keep in memory.
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Example:
    """One row, ready to train on.

    Attributes:
      input_ids: `[T]` int32.
      segments: `[T]` int8, values of `Segment`.
      weights: `[T]` float32; `weights[t]` is the weight of predicting token t, so the first is 0.
      source: file and row.
    """

    input_ids: np.ndarray
    segments: np.ndarray
    weights: np.ndarray
    source: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a row: an example, or the cause of its loss.

    Attributes:
      example: the example, cut to length; None if the row is dropped.
      cause: a key of `CAUSES` if the row is dropped.
      tokens: the row before the cut.
    """

    example: Example | None
    cause: str | None
    tokens: Tokens


@dataclass(frozen=True)
class Encoder:
    """The settings by which conversations become examples.

    Attributes:
      renderer: tokenizer and template.
      mode: loss mode, see `weights.MODES`.
      prompt_weight: for the mode `weighted`.
      max_length: the most tokens of an example, at least 2.
      truncation: one of `TRUNCATIONS`.
      vocab_size: the model's number of ids; larger ids are refused. None: not checked.
    """

    renderer: Renderer
    mode: str = "masked"
    prompt_weight: float = 0.0
    max_length: int = 512
    truncation: str = "right"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        weight_table(self.mode, self.prompt_weight)
        if self.max_length < 2:
            raise InputError(
                f"max_length is {self.max_length}: it must be at least 2, to predict one token from another"
            )
        if self.truncation not in TRUNCATIONS:
            raise InputError(
                f"unknown truncation {self.truncation!r}: choose one of {', '.join(TRUNCATIONS)}"
            )

    def encode(self, conversations: Iterable[Conversation]) -> Iterator[Encoded]:
        """Encodes conversations, lazily and in order."""
        remaining = iter(conversations)
        while chunk := list(islice(remaining, _CHUNK)):
            tokens = tokenize(
                [self.renderer.render(conversation) for conversation in chunk], self.renderer.tokenizer
            )
            for conversation, row in zip(chunk, tokens, strict=True):
                self._check_ids(row.input_ids, conversation.source)
                yield self._weigh(row, conversation.source)

    def _weigh(self, row: Tokens, source: str) -> Encoded:
        if self.truncation == "drop" and len(row.input_ids) > self.max_length:
            return Encoded(None, "too_long", row)
        weights = token_weights(row.segments, self.mode, self.prompt_weight)
        if weights[: self.max_length].any():
            return Encoded(
                _cut(Example(row.input_ids, row.segments, weights, source), self.max_length), None, row
            )
        if weights.any():
            return Encoded(None, "answer_cut_off", row)
        answered = np.isin(row.segments, RESPONSE).any()
        return Encoded(None, "no_weight" if answered else "no_answer", row)

    def _check_ids(self, input_ids: np.ndarray, source: str) -> None:
        if self.vocab_size is not None and len(input_ids) and int(input_ids.max()) >= self.vocab_size:
            worst = int(input_ids.max())
            token = self.renderer.tokenizer.convert_ids_to_tokens(worst)
            raise InputError(
                f"{source}: token {token!r} has id {worst}, outside the model's {self.vocab_size} embeddings;"
                " use the tokenizer that belongs to the model"
            )


def _cut(example: Example, length: int) -> Example:
    if len(example) <= length:
        return example
    # Copies, because views would keep the whole of a long row in memory.
    return Example(
        example.input_ids[:length].copy(),
        example.segments[:length].copy(),
        example.weights[:length].copy(),
        example.source,
    )


def encode(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    template: str | None = None,
    *,
    mode: str = "masked",
    prompt_weight: float = 0.0,
) -> list[Example]:
    """Encodes conversations without any cut or drop: for a look at what becomes of them.

    Args:
      conversations: `[N]`.
      tokenizer: a fast `transformers` tokenizer.
      template: as for `Renderer`.
      mode: see `weights.MODES`.
      prompt_weight: for the mode `weighted`.

    Returns:
      `[N]` examples.
    """
    renderer = Renderer(tokenizer, template)
    rows = tokenize([renderer.render(conversation) for conversation in conversations], tokenizer)
    return [
        Example(
            row.input_ids, row.segments, token_weights(row.segments, mode, prompt_weight), conversation.source
        )
        for conversation, row in zip(conversations, rows, strict=True)
    ]
