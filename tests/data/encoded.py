"""Rows to tokens and weights in one step, for tests that look at single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mora_jax.data import LossWeights, Renderer, Row, Tokens, token_weights
from mora_jax.data.tokens.encode import tokenize_rows


@dataclass(frozen=True)
class Encoded:
    """A row's tokens with the weight of predicting each."""

    tokens: Tokens
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def input_ids(self) -> np.ndarray:
        return self.tokens.input_ids

    @property
    def segments(self) -> np.ndarray:
        return self.tokens.segments

    @property
    def turns(self) -> np.ndarray:
        return self.tokens.turns


def encode(rows: Sequence[Row], tokenizer: Any, template: str | None = None, **loss: Any) -> list[Encoded]:
    """Tokens and weights of rows that are all good."""
    encoded = []
    for tokens in tokenize_rows(rows, Renderer(tokenizer, template)):
        assert isinstance(tokens, Tokens), tokens
        encoded.append(Encoded(tokens, token_weights(tokens, LossWeights(**loss))))
    return encoded
