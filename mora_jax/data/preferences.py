"""Data of preferences in batches: every example is two sequences, which have rows of their own side by side.

Of a pair they are the prompt with the chosen answer and with the rejected one; of a labelled answer the prompt with it,
and with the answer of another example, by which KTO estimates how far the model has moved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mora_jax.batch import PreferenceBatch
from mora_jax.data.batch_plan import padded_length
from mora_jax.data.conversation import Side
from mora_jax.data.dataset import EncodedDataset, Example, lay, split_rows
from mora_jax.data.loss_weights import normalize
from mora_jax.data.tokens.store import TokenStore
from mora_jax.errors import InputError


class PreferenceDataset(Sequence[Example]):
    """Examples of preferences: a sequence of their chosen or labelled answers.

    Args:
      answers: rows that judge answers; those of a pair follow each other and were cut alike.
      labelled: whether each answer is an example by itself, as KTO has it; pairs are then two examples.
      packing: whether several examples share a row.

    Attributes:
      report: counts over all answers.
      lengths: `[N]` int32, tokens of the longer sequence of each example.
      max_length: no sequence is longer.
      sequences: the most sequences of a row.
      reference: float32 `[N, 2]`, the log-probabilities of both answers under the reference; None: not known here.

    Raises:
      InputError: the rows judge no answers, or not in the way that is asked for.
    """

    def __init__(self, answers: EncodedDataset, *, labelled: bool = False, packing: bool = False):
        self.answers, self.labelled, self.report = answers, labelled, answers.report
        self.reference: np.ndarray | None = None
        self.max_length = answers.max_length
        sides = answers.sides
        if not sides.all() or (not labelled and not np.isin(sides, (Side.CHOSEN, Side.REJECTED)).all()):
            wanted = "`completion` and `label` (true or false), or pairs" if labelled else "`chosen` and `rejected`"
            raise InputError(
                f"{', '.join(answers.report.files[:3]) or 'the data'}: this objective is trained on rows of {wanted}, "
                f"and these were read as {answers.report.format or 'none'}; data.format="
                f"{'labelled' if labelled else 'preference'} names the first row that doesn't fit"
            )
        self._starts = np.array([_start(answer) for answer in answers] if labelled else (), int)
        if labelled and len(answers) < 2:
            raise InputError("labelled answers are compared with others' answers: give two rows or more")
        sizes = answers.lengths
        if labelled:
            other = self._partner(np.arange(len(sizes)))
            crossed = np.minimum(self._starts + sizes[other] - self._starts[other], self.max_length)
            self.lengths = np.maximum(sizes, crossed).astype(np.int32)
        else:
            self.lengths = np.maximum(sizes[::2], sizes[1::2])
        self.sequences = max(1, self.max_length // int(self.lengths.min())) if packing else 1

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.answers[int(index) if self.labelled else 2 * int(index)]

    def _partner(self, index: Any) -> Any:
        """The example whose answer stands beside that of `index`: half the data set away."""
        count = len(self.answers)
        return (index + count // 2) % count

    def sequences_of(self, index: int) -> tuple[Example, Example]:
        """Both sequences of an example."""
        if not self.labelled:
            return self.answers[2 * index], self.answers[2 * index + 1]
        example, other = self.answers[index], self.answers[self._partner(index)]
        start, begin = self._starts[index], self._starts[self._partner(index)]

        def crossed(ours: Any, theirs: Any) -> np.ndarray:
            return np.concatenate([ours[:start], theirs[begin:]])[: self.max_length]

        names = ("input_ids", "segments", "weights", "answer_weights")
        arrays: dict[str, Any] = {name: crossed(getattr(example, name), getattr(other, name)) for name in names}
        return example, Example(**arrays, weight=example.weight, source=example.source)

    @property
    def batch_length(self) -> int:
        """As that of an `EncodedDataset`."""
        return padded_length(int(self.lengths.max()), self.max_length)

    def fingerprint(self) -> str:
        """That of the answers."""
        return self.answers.fingerprint()

    def batch(
        self,
        rows: Sequence[Any] | np.ndarray,
        batch_size: int | None = None,
        length: int | None = None,
        *,
        how: str = "token",
        extra: Mapping[str, str] | None = None,
    ) -> PreferenceBatch:
        """Lays examples into rows, two a row: of the first and of the second sequence of each.

        Args:
          rows, batch_size, length, how: as in `EncodedDataset.batch`; `how` is the normaliser of the SFT term.
          extra: nothing.
        """
        assert not extra, "preferences have no divergence beside them"
        batch_size = len(rows) if batch_size is None else batch_size
        length = self.batch_length if length is None else length
        shape, by_example = (batch_size, 2, length), (batch_size, self.sequences)
        integers = {name: np.zeros(shape, np.int32) for name in ("input_ids", "segment_ids", "positions")}
        floats = {name: np.zeros(shape, np.float32) for name in ("weights", "answer_weights")}
        examples = {name: np.zeros(by_example, np.float32) for name in ("example_weights", "desired")}
        batch: Any = {**integers, **floats, **examples, "counts": np.zeros(batch_size, np.float32)}
        if self.reference is not None:
            batch["reference_logps"] = np.zeros((batch_size, 2, self.sequences), np.float32)
        for row, members in enumerate(rows):
            ends = [0, 0]
            for number, index in enumerate(np.atleast_1d(members).tolist()):
                both = self.sequences_of(index)
                for half, example in enumerate(both):
                    used = lay(batch, (row, half), ends[half], number + 1, example)
                    batch["answer_weights"][row, half, used] = example.answer_weights
                    ends[half] = used.stop
                first, used = both[0], slice(ends[0] - len(both[0]), ends[0])
                batch["example_weights"][row, number] = first.weight
                batch["desired"][row, number] = first.side in (Side.CHOSEN, Side.DESIRED)
                if first.side in (Side.CHOSEN, Side.DESIRED):
                    weights, count = normalize(first.weights, first.segments, first.weight, how)
                    batch["weights"][row, 0, used] = weights
                    batch["counts"][row] += count
                if self.reference is not None:
                    batch["reference_logps"][row, :, number] = self.reference[index]
        return batch


def _start(example: Example) -> int:
    """The first token of an answer."""
    assert example.answer_weights is not None, "rows that judge answers have them"
    return int(np.flatnonzero(example.answer_weights)[0])


def split_preferences(store: TokenStore, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`split_rows` for rows that judge answers: both rows of a pair lie on one side."""
    sides = store.sides
    first = np.flatnonzero(sides != Side.REJECTED)

    def rows(chosen: np.ndarray) -> np.ndarray:
        starts = first[chosen]
        return np.sort(np.concatenate([starts, starts[sides[starts] == Side.CHOSEN] + 1]))

    train, held_out = split_rows(len(first), fraction, seed)
    return rows(train), rows(held_out)


def refuse_preferences(store: TokenStore) -> None:
    """Refuses rows that judge answers where each row is to be trained on or scored by itself.

    Raises:
      InputError: with what to do instead.
    """
    if store.sides.any():
        files = ", ".join(store.facts.get("files", ())[:3])
        raise InputError(
            f"{files or 'the data'}: the rows judge answers (`chosen` and `rejected`, or `label`): set loss.objective="
            "dpo or another objective of preferences; to train on chosen answers alone set data.columns to "
            "messages=chosen (of texts completion=chosen), and of labelled rows keep those of label true, with "
            "data.columns ignore=label"
        )
