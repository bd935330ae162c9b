"""What happens to a row that is longer than `max_length`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from mora_jax.data.loss_weights import response_tokens
from mora_jax.data.segments import Segment


class Cut(NamedTuple):
    """The tokens of a row that make up one example: `[0, head)`, then `[start, stop)`."""

    head: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many tokens these are."""
        return self.head + self.stop - self.start

    def take(self, values: np.ndarray) -> np.ndarray:
        """Those of `[T]` values that are kept."""
        if not self.head:
            return values[self.start : self.stop]
        return np.concatenate([values[: self.head], values[self.start : self.stop]])


def _drop(segments: np.ndarray, weights: np.ndarray, limit: int) -> Iterator[Cut]:
    yield from ()


def _right(segments: np.ndarray, weights: np.ndarray, limit: int) -> Iterator[Cut]:
    yield Cut(0, 0, limit)


def _left(segments: np.ndarray, weights: np.ndarray, limit: int) -> Iterator[Cut]:
    head = _bos(segments)
    yield Cut(head, len(segments) - limit + head, len(segments))


def _prompt_first(segments: np.ndarray, weights: np.ndarray, limit: int) -> Iterator[Cut]:
    """Keeps the last run of trained tokens with as much as fits of what stands before it."""
    trained = np.flatnonzero(response_tokens(segments) & (weights > 0))
    if not len(trained):
        trained = np.flatnonzero(weights)
    stop = int(trained[-1]) + 1
    head = _bos(segments)
    breaks = np.flatnonzero(np.diff(trained) > 1)
    first = int(trained[breaks[-1] + 1] if len(breaks) else trained[0])
    # One token stays before the answer, from which its first is predicted; an answer too long loses its end.
    start = min(max(stop - limit + head, head), max(first - 1, head))
    yield Cut(head, start, min(stop, start + limit - head))


def _split(segments: np.ndarray, weights: np.ndarray, limit: int) -> Iterator[Cut]:
    """Pieces that overlap by one token: the first of a piece is predicted by the piece before."""
    for start in range(0, len(segments) - 1, limit - 1):
        stop = min(start + limit, len(segments))
        if weights[start + 1 : stop].any():
            yield Cut(0, start, stop)


def _bos(segments: np.ndarray) -> int:
    """How many tokens at the beginning stay in any case: the beginning-of-sequence token."""
    return int(len(segments) > 0 and segments[0] == Segment.BOS)


#: Policy -> the examples that a row longer than the limit becomes.
TRUNCATIONS: dict[str, Callable[[np.ndarray, np.ndarray, int], Iterator[Cut]]] = {
    "right": _right,
    "left": _left,
    "prompt_first": _prompt_first,
    "split": _split,
    "drop": _drop,
}


def cut(segments: np.ndarray, weights: np.ndarray, limit: int, policy: str) -> list[Cut]:
    """The examples that a row becomes.

    Args:
      segments: `[T]` values of `Segment`.
      weights: `[T]`, the weight of predicting each token.
      limit: the most tokens of an example, at least 2.
      policy: a key of `TRUNCATIONS`: `right` cuts the end off, `left` the beginning (but for the
        beginning-of-sequence token), `prompt_first` as much of the beginning as the last answer needs, `split`
        makes several examples, `drop` none.

    Returns:
      Those examples that have a trained token other than their first, which nothing predicts.
    """
    if len(segments) <= limit:
        whole = Cut(0, 0, len(segments))
        return [whole] if weights[1:].any() else []
    if not weights[1:].any():
        return []
    return [part for part in TRUNCATIONS[policy](segments, weights, limit) if part.take(weights)[1:].any()]
