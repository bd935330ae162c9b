"""The encoded data set: examples with their weights, what became of the rows, and padded or packed batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import numpy as np

from mora_jax.batch import Batch
from mora_jax.data.batch_plan import padded_length
from mora_jax.data.conversation import Row, Side
from mora_jax.data.examples import TRUNCATIONS, Cut, RowOutcomes, answer_weights, find_examples, flat_weights
from mora_jax.data.formats.load import Rows
from mora_jax.data.inspect.report import Report, count
from mora_jax.data.loss_weights import LossWeights, normalize, response_tokens, token_weights
from mora_jax.data.segments import INSTRUCTION, Segment, runs
from mora_jax.data.sources import build_store
from mora_jax.data.tokens.encode import RowEncoder, notes
from mora_jax.data.tokens.store import FlatRows, TokenStore
from mora_jax.errors import InputError


@dataclass(frozen=True, slots=True)
class Example:
    """One example, ready to train on.

    Attributes:
      input_ids: `[T]` int32.
      segments: `[T]` int8, values of `Segment`.
      weights: `[T]` float32; `weights[t]` is the weight of predicting token t, so the first is 0.
      weight: what the example counts beside the others.
      source: file and row.
      side: how its answer is judged.
      answer_weights: `[T]` float32, the weight of each token in the log-probability of a judged answer; None for other
        rows.
    """

    input_ids: np.ndarray
    segments: np.ndarray
    weights: np.ndarray
    weight: float = 1.0
    source: str = ""
    side: Side = Side.NONE
    answer_weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __str__(self) -> str:
        trained = int(np.count_nonzero(self.weights))
        lines = [f"{len(self)} tokens, {trained} of them trained ({self.source or 'no source'})"]
        labels = [Segment(segment).label for segment in self.segments.tolist()]
        for (weight, label), part in runs(zip(self.weights.tolist(), labels, strict=True)):
            lines.append(f"{weight:>8.3g}  {label:12} {part.stop - part.start:4} tokens")
        return "\n".join(lines)


class EncodedDataset(Sequence[Example]):
    """Examples that a model can be trained on: a sequence of them.

    The tokens are the store's; weights and cuts are made for each example that is asked for, so that data sets
    of several loss modes share one store, and memory holds a few numbers an example.

    Args:
      store: rows of tokens.
      loss: which tokens count, and how much.
      max_length: the most tokens of an example, at least 2.
      truncation: a key of `TRUNCATIONS`.
      rows: which rows of the store; None: all.
      vocab_size: the model's number of ids; larger ids are refused. None: not checked.
      special_ids: ids of special tokens; rows whose own words hold one are counted.

    Attributes:
      report: counts over all rows.
      lengths: `[N]` int32, tokens of each example.
      max_length: no example is longer.

    Raises:
      InputError: for unusable settings, for an id outside the vocabulary, and if no row is left.
    """

    def __init__(
        self,
        store: TokenStore,
        loss: LossWeights = LossWeights(),
        max_length: int = 512,
        truncation: str = "right",
        *,
        rows: np.ndarray | None = None,
        vocab_size: int | None = None,
        special_ids: Iterable[int] = (),
    ):
        if max_length < 2:
            raise InputError(f"max_length is {max_length}: it must be at least 2, to predict one token from another")
        if truncation not in TRUNCATIONS:
            raise InputError(f"unknown truncation {truncation!r}: choose one of {', '.join(TRUNCATIONS)}")
        self.store, self.loss, self.max_length, self.truncation = store, loss, max_length, truncation
        self._scan(rows, vocab_size, np.array(sorted(special_ids), np.int32))
        if not len(self.lengths):
            raise InputError(self.report.nothing_left(max_length))

    @classmethod
    def build(
        cls,
        rows: Iterable[Row],
        tokenizer: Any,
        template: str | None = None,
        mode: str = "masked",
        prompt_weight: float = 0.0,
        max_length: int = 512,
        *,
        truncation: str = "right",
        vocab_size: int | None = None,
    ) -> EncodedDataset:
        """Encodes rows in memory.

        Args:
          rows: `N` rows, such as `load_rows` gives.
          tokenizer: a fast `transformers` tokenizer.
          template: a built-in template's name, `tokenizer`, a Jinja file, or None: the tokenizer's own, else `alpaca`.
          mode: a loss mode, see `MODES`.
          prompt_weight: weight of instruction tokens in `weighted` and `wit`, in [0, 1].
          max_length: the most tokens of an example.
          truncation: see `TRUNCATIONS`.
          vocab_size: the model's number of ids; larger ones are refused.

        Returns:
          The data set; rows without any trained token are dropped and counted in its report.

        Raises:
          InputError: for unusable settings or rows, and if no row is left.
        """
        loss = LossWeights(mode, prompt_weight)
        encoder = RowEncoder(tokenizer, template)
        facts = {
            "format": rows.format if isinstance(rows, Rows) else "",
            "template": encoder.renderer.template,
            "notes": list(encoder.renderer.notes),
        }
        store = build_store(encoder, ((row.source, row) for row in rows), facts)
        return cls(store, loss, max_length, truncation, vocab_size=vocab_size, special_ids=tokenizer.all_special_ids)

    def _scan(self, rows: np.ndarray | None, vocab_size: int | None, special: np.ndarray) -> None:
        """One pass over the store: which rows become which examples, and the report."""
        facts = self.store.facts
        chosen = np.zeros(len(self.store), bool)
        chosen[slice(None) if rows is None else rows] = True
        outcomes = RowOutcomes()
        counts = facts.get("counts", {})
        if counts.get("skipped"):
            # Of the whole store, also where only a part of its rows is chosen: a bad row belongs to no part.
            outcomes.dropped["bad_row"] = counts["skipped"]
        tables: list[np.ndarray] = []
        counted: list[dict[str, Any]] = []
        first = 0
        for flat in self.store.flat():
            here = chosen[first : first + len(flat)]
            if here.any():
                self._check_ids(flat, first, vocab_size)
                weights = flat_weights(flat, self.loss)
                needed = weights if not flat.side.any() else answer_weights(flat)
                examples = find_examples(flat, needed, here, self.max_length, self.truncation, outcomes)
                tables.append(examples + np.array([first, 0, 0, 0]))
                counted.append(count(flat, weights, here, special))
            first += len(flat)
        table = np.concatenate(tables) if tables else np.zeros((0, 4), np.int64)
        self._rows, self._cuts = table[:, 0], table[:, 1:].astype(np.int32)
        self.lengths = self._cuts[:, 0] + self._cuts[:, 2] - self._cuts[:, 1]
        known: dict[str, Any] = {
            name: facts[name] for name in ("format", "template", "files", "reasons") if name in facts
        }
        known |= {"fell_back": counts.get("fell_back", 0), "notes": [*facts.get("notes", ()), *notes(counts)]}
        self.report = Report.of(
            counted, outcomes, kept=len(table), mode=self.loss.mode, max_length=self.max_length, **known
        )

    def _check_ids(self, flat: FlatRows, first: int, vocab_size: int | None) -> None:
        if vocab_size is None or not len(flat.input_ids) or int(flat.input_ids.max()) < vocab_size:
            return
        at = int(flat.input_ids.argmax())
        row = int(np.searchsorted(flat.offsets, at, side="right")) - 1
        raise InputError(
            f"{self.store.source(first + row)}: token id {flat.input_ids[at]} is outside the model's {vocab_size}"
            " embeddings; use the tokenizer that belongs to the model"
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row, piece = int(self._rows[index]), Cut(*self._cuts[index].tolist())
        tokens = self.store[row]
        weights = piece.take(token_weights(tokens, self.loss))
        weights[:1] = 0.0
        of_answer = None
        if tokens.side:
            of_answer = piece.take(np.where(tokens.turns >= tokens.answer, token_weights(tokens), 0.0))
            of_answer[:1] = 0.0
        return Example(
            piece.take(tokens.input_ids),
            piece.take(tokens.segments),
            weights,
            tokens.weight,
            self.store.source(row),
            Side(tokens.side),
            of_answer,
        )

    @property
    def sides(self) -> np.ndarray:
        """How the answer of each example is judged: `[N]` int8, values of `Side`."""
        return self.store.sides[self._rows]

    @property
    def batch_length(self) -> int:
        """A length for every example: the longest, rounded up to a multiple of 64 (at most `max_length`)."""
        return padded_length(int(self.lengths.max()), self.max_length)

    def fingerprint(self) -> str:
        """A hash of the tokens, their segments, turns and judged answers, of rows, cuts and the loss mode."""
        digest = hashlib.sha256(repr(self.loss).encode())
        parts = [self._rows, self._cuts]
        for flat in self.store.flat():
            parts += [flat.input_ids, flat.segments, flat.turns, flat.turn_weights, flat.weight]
            parts += flat.token_weights.values()
            parts += [flat.side, flat.answer] if flat.side.any() else []
        for part in parts:
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:32]

    def with_loss(self, loss: LossWeights, rows: np.ndarray | None = None, **changes: Any) -> EncodedDataset:
        """The same tokens under another loss mode, or other rows of the same store; nothing is tokenised again.

        Args:
          loss: which tokens carry loss.
          rows: numbers of the store's rows, int64 `[N]`; None for all.
          **changes: further arguments of `EncodedDataset`.

        Returns:
          A new data set; this one stays as it is.
        """
        return EncodedDataset(self.store, loss, self.max_length, self.truncation, rows=rows, **changes)

    def batch(
        self,
        rows: Sequence[int] | np.ndarray | Sequence[np.ndarray],
        batch_size: int | None = None,
        length: int | None = None,
        *,
        how: str = "token",
        extra: Mapping[str, str] | None = None,
    ) -> Batch:
        """Lays examples into rows of one shape.

        Args:
          rows: for each row an example, or the examples that are packed into it; at most `batch_size` rows.
          batch_size: rows; a short batch is filled with empty rows. None: as many as `rows`.
          length: tokens a row; None: `batch_length`.
          how: the normaliser that weights and counts are made for, see `normalize`.
          extra: further arrays `[B, T]` to give along, by name: `trained` marks response tokens that carry loss,
            `prompt` those of instructions, but never the first of an example.

        Returns:
          A batch with `positions` (from 0 in each example), `counts`, and what `extra` names: float32 with 1 for a
          marked token.
        """
        batch_size = len(rows) if batch_size is None else batch_size
        length = self.batch_length if length is None else length
        if len(rows) > batch_size:
            raise ValueError(f"{len(rows)} rows do not fit a batch of {batch_size}")
        shape = (batch_size, length)
        kinds = extra or {}
        integers = {name: np.zeros(shape, np.int32) for name in ("input_ids", "segment_ids", "positions")}
        floats = {name: np.zeros(shape, np.float32) for name in ("weights", *kinds)}
        batch: dict[str, np.ndarray] = {**integers, **floats, "counts": np.zeros(batch_size, np.float32)}
        for row, members in enumerate(rows):
            start, count = 0, 0.0
            for number, index in enumerate(np.atleast_1d(members), start=1):
                example = self[int(index)]
                used = lay(batch, row, start, number, example)
                weights, part = normalize(example.weights, example.segments, example.weight, how)
                batch["weights"][row, used] = weights
                for name, kind in kinds.items():
                    batch[name][row, used] = _marked(example, kind)
                start, count = used.stop, count + part
            with np.errstate(over="ignore"):  # infinite where weights add up to more than float32 holds
                batch["counts"][row] = count
        return cast(Batch, batch)

    def __str__(self) -> str:
        return str(self.report)


def lay(batch: Mapping[str, Any], row: int | tuple[int, int], start: int, number: int, example: Example) -> slice:
    """Writes an example's tokens into a row of a batch, from the column `start` on; returns the columns they take."""
    used, length = slice(start, start + len(example)), batch["input_ids"].shape[-1]
    if used.stop > length:
        raise ValueError(f"{used.stop} tokens do not fit a row of {length}")
    batch["input_ids"][row][used] = example.input_ids
    batch["segment_ids"][row][used] = number
    batch["positions"][row][used] = np.arange(len(example))
    return used


def _marked(example: Example, kind: str) -> np.ndarray:
    """1 for the tokens of a kind, but the first of the example, which nothing predicts."""
    if kind == "trained":
        chosen = response_tokens(example.segments) & (example.weights > 0)
    elif kind == "prompt":
        chosen = np.isin(example.segments, INSTRUCTION)
    else:
        raise ValueError(f"unknown kind of tokens {kind!r}: trained or prompt")
    chosen[:1] = False
    return chosen.astype(np.float32)


def split_rows(count: int, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sets a part of the rows aside for evaluation.

    Args:
      count: how many rows there are.
      fraction: the share to set aside, in (0, 1); at least one row.
      seed: the same seed gives the same split.

    Returns:
      Numbers of the rows to train on and of those to evaluate on, each in order.
    """
    if not 0.0 < fraction < 1.0:
        raise InputError(f"eval_fraction is {fraction}: it must be between 0 and 1")
    held_out = max(1, round(fraction * count))
    if held_out >= count:
        raise InputError(f"eval_fraction {fraction} of {count} rows leaves nothing to train on")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
