"""From many rows of tokens at once to the examples that they become: weights, and cuts where a row is too long."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mora_jax.data.conversation import Side
from mora_jax.data.loss_weights import LossWeights, response_tokens, segment_weights
from mora_jax.data.segments import Segment
from mora_jax.data.tokens.store import FlatRows


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


def cut_pair(starts: Sequence[int], lengths: Sequence[int], head: int, limit: int, policy: str) -> list[Cut]:
    """The examples of a chosen and a rejected answer whose rows begin with one prompt: what it loses, it loses in both.

    Args:
      starts: the first token of each answer.
      lengths: tokens of each row.
      head: tokens at the beginning that stay in any case.
      limit: the most tokens of an example.
      policy: a key of `TRUNCATIONS`; with `left` and `prompt_first` the prompt loses its beginning, then an answer that
        is too long its end.

    Returns:
      Two cuts; none where nothing of an answer would be left, and under `drop`.
    """
    excess = max(lengths) - limit
    if excess > 0 and policy == "drop":
        return []
    removed = 0 if excess <= 0 or policy == "right" else max(0, min(excess, min(starts) - 1 - head))
    kept_head = head if removed else 0
    cuts = [Cut(kept_head, kept_head + removed, min(length, removed + limit)) for length in lengths]
    return cuts if all(cut.stop > start for cut, start in zip(cuts, starts, strict=True)) else []


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
        return [Cut(0, 0, len(segments))] if weights[1:].any() else []
    if not weights[1:].any():
        return []
    return [part for part in TRUNCATIONS[policy](segments, weights, limit) if part.take(weights)[1:].any()]


@dataclass
class RowOutcomes:
    """What became of rows, counted.

    Attributes:
      dropped: rows left out, by cause ((keys of `report.CAUSES`)).
      truncated: rows that lost a part.
      split: rows that became several examples.
      tokens: tokens of the examples.
      trained_tokens: those whose weight is not 0.
      trained_before: tokens with a weight before any cut, of the rows that have some.
    """

    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    split: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    trained_before: int = 0

    def drop(self, cause: str, rows: int = 1) -> None:
        """Counts rows that are left out."""
        self.dropped[cause] = self.dropped.get(cause, 0) + rows


def flat_weights(flat: FlatRows, loss: LossWeights) -> np.ndarray:
    """Weights of predicting each token of all rows, `[T]` float32; 0 for the first of each row.

    The same as `token_weights` of each row, some hundred times faster; for a single row it is three times slower.
    """
    rows, lengths = len(flat), flat.lengths
    turns = np.zeros(rows, np.int64)
    np.maximum.at(turns, np.repeat(np.arange(rows), lengths), flat.turns.astype(np.int64) + 1)
    given = np.diff(flat.turn_offsets)
    turns = np.maximum(turns, given)
    # Turns are numbered through all rows; the entry after the last one is for tokens of no turn.
    starts = np.concatenate([[0], np.cumsum(turns)])
    said = np.full(starts[-1] + 1, np.nan, np.float32)
    for row in np.flatnonzero(given).tolist():
        said[starts[row] : starts[row] + given[row]] = flat.turn_weights[
            flat.turn_offsets[row] : flat.turn_offsets[row + 1]
        ]
    numbered = np.where(flat.turns < 0, -1, flat.turns + np.repeat(starts[:-1], lengths))
    row_of = np.append(np.repeat(np.arange(rows), turns), 0)
    weights = segment_weights(flat.segments, numbered, said, row_of, loss)
    for row, row_weights in flat.token_weights.items():
        weights[flat.offsets[row] : flat.offsets[row + 1]] = row_weights
    weights[flat.offsets[:-1][lengths > 0]] = 0.0
    return weights


def answer_weights(flat: FlatRows) -> np.ndarray:
    """Weights of predicting the tokens of judged answers, `[T]` float32: those of `masked`, 0 in the turns before."""
    answers = flat.turns >= np.repeat(flat.answer, flat.lengths)
    return np.where(answers, flat_weights(flat, LossWeights()), 0.0).astype(np.float32)


def find_examples(
    flat: FlatRows, weights: np.ndarray, chosen: np.ndarray, max_length: int, truncation: str, outcomes: RowOutcomes
) -> np.ndarray:
    """The examples that rows become.

    Args:
      flat: the rows.
      weights: `[T]`, see `flat_weights`; of rows that judge answers see `answer_weights`.
      chosen: `[R]` bool, the rows to look at, of a pair both.
      max_length: the most tokens of an example.
      truncation: see `cut`.
      outcomes: counts, added to.

    Returns:
      `[E, 4]` int64: the row of each example, and its `Cut`.
    """
    lengths = flat.lengths
    trained = flat.per_row(weights > 0)
    answers = flat.per_row(response_tokens(flat.segments))
    usable = (flat.weight > 0) & (trained > 0)
    uncut = chosen & usable & (lengths <= max_length)
    first = np.flatnonzero(flat.side == Side.CHOSEN)
    for marks in (usable, uncut):  # both halves of a pair, or neither
        marks[first] = marks[first + 1] = marks[first] & marks[first + 1]

    def part(row: int) -> slice:
        return slice(*flat.offsets[row : row + 2].tolist())

    for row in first[uncut[first] & (lengths[first] == lengths[first + 1])].tolist():
        if np.array_equal(flat.input_ids[part(row)], flat.input_ids[part(row + 1)]):
            uncut[row] = uncut[row + 1] = False
    examples = [(row, 0, 0, int(lengths[row])) for row in np.flatnonzero(uncut).tolist()]
    outcomes.tokens += int(lengths[uncut].sum())
    outcomes.trained_tokens += int(trained[uncut].sum())
    outcomes.trained_before += int(trained[chosen & usable].sum())
    for row in np.flatnonzero(chosen & ~uncut & (flat.side != Side.REJECTED)).tolist():
        paired = flat.side[row] == Side.CHOSEN
        parts = [part(one) for one in range(row, row + 1 + paired)]
        if not usable[row]:
            outcomes.drop("no_weight" if answers[row] else "no_answer", len(parts))
            continue
        if paired:
            starts = [int(np.flatnonzero(weights[part])[0]) for part in parts]
            sizes = [part.stop - part.start for part in parts]
            cuts = cut_pair(starts, sizes, _bos(flat.segments[parts[0]]), max_length, truncation)
        else:
            cuts = cut(flat.segments[parts[0]], weights[parts[0]], max_length, truncation)
        if not cuts:
            outcomes.drop("too_long" if truncation == "drop" else "answer_cut_off", len(parts))
            continue
        if paired:
            chosen_ids, rejected_ids = (cuts[half].take(flat.input_ids[parts[half]]) for half in range(2))
            if np.array_equal(chosen_ids, rejected_ids):
                outcomes.drop("tie", len(parts))
                continue
        if truncation == "split":
            outcomes.split += 1
        else:
            outcomes.truncated += sum(
                piece.length < part.stop - part.start for piece, part in zip(cuts, parts, strict=True)
            )
        for number, piece in enumerate(cuts):
            examples.append((row + number * paired, *piece))
            outcomes.tokens += piece.length
            outcomes.trained_tokens += int(np.count_nonzero(piece.take(weights[parts[number * paired]])[1:]))
    return np.array(sorted(examples), np.int64).reshape(-1, 4)
