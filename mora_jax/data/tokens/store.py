"""Tokens on disk: rows in Arrow record batches, memory-mapped, read at any place without loading the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mora_jax.data.segments import ANSWER, INSTRUCTION
from mora_jax.data.tokens.tokenize import Tokens

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("segments", pa.list_(pa.int8())),
        ("turns", pa.list_(pa.int16())),
        ("turn_weights", pa.list_(pa.float32())),
        ("weights", pa.list_(pa.float32())),
        ("weight", pa.float32()),
        ("seams", pa.int32()),
        ("prompt", pa.uint64()),
        ("side", pa.int8()),
        ("answer", pa.int16()),
        ("source", pa.string()),
    ]
)

#: The columns of a row's tokens, which all rows have.
_ARRAYS = ("input_ids", "segments", "turns")


def make_batch(rows: Sequence[tuple[Tokens, str]]) -> pa.RecordBatch:
    """Rows and their sources as one record batch of `SCHEMA`."""
    # Arrays are made from buffers and read as such: `pa.array` and `to_numpy` would import pandas for a second.
    columns: dict[str, list[Any]] = {
        "prompt": [prompt_hash(tokens) for tokens, _ in rows],
        "source": [source.encode() for _, source in rows],
    }
    for name in set(SCHEMA.names) - columns.keys():
        columns[name] = [getattr(tokens, name) for tokens, _ in rows]
    arrays = [_array(columns[field.name], field.type) for field in SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    """Numbers, lists of numbers (None: no list) or encoded text."""
    if not pa.types.is_list(kind) and kind != pa.string():
        flat = np.asarray(values, kind.to_pandas_dtype())
        return pa.Array.from_buffers(kind, len(flat), [None, pa.py_buffer(flat)])
    offsets = np.cumsum([0, *(0 if value is None else len(value) for value in values)], dtype=np.int32)
    if kind == pa.string():
        return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(b"".join(values)))
    dtype = kind.value_type.to_pandas_dtype()
    flat = np.concatenate([np.zeros(0, dtype), *(np.asarray(value, dtype) for value in values if value is not None)])
    valid = np.packbits(np.array([value is not None for value in values], bool), bitorder="little")
    buffers = [pa.py_buffer(valid), pa.py_buffer(offsets)]
    return pa.Array.from_buffers(kind, len(values), buffers, children=[_array(flat, kind.value_type)])


_IS_INSTRUCTION = np.isin(np.arange(128), INSTRUCTION)
_IS_ANSWER = np.isin(np.arange(128), ANSWER)


def instruction_ids(tokens: Tokens) -> np.ndarray:
    """The ids of the instructions before the first answer."""
    answers = np.flatnonzero(_IS_ANSWER[tokens.segments])
    stop = answers[0] if len(answers) else len(tokens)
    return tokens.input_ids[:stop][_IS_INSTRUCTION[tokens.segments[:stop]]]


def prompt_hash(tokens: Tokens) -> int:
    """A number that rows with the same `instruction_ids` share; 0 for rows without any."""
    instruction = instruction_ids(tokens)
    if not len(instruction):
        return 0
    from xxhash import xxh3_64_intdigest

    return xxh3_64_intdigest(instruction.tobytes())


@dataclass(frozen=True)
class FlatRows:
    """The rows of one record batch, their tokens one after the other.

    Attributes:
      offsets: `[R + 1]`, where each row begins.
      input_ids, segments, turns: `[T]`.
      turn_offsets: `[R + 1]` into `turn_weights`.
      turn_weights: float32, what the data says that single messages count.
      token_weights: for rows whose tokens have weights of their own, these weights by row.
      weight: `[R]` float32, what each row counts.
      seams: `[R]`.
      prompt: `[R]` uint64, see `prompt_hash`.
      side: `[R]` int8, values of `Side`.
      answer: `[R]` int16, the turn with which the judged answer begins.
    """

    offsets: np.ndarray
    input_ids: np.ndarray
    segments: np.ndarray
    turns: np.ndarray
    turn_offsets: np.ndarray
    turn_weights: np.ndarray
    token_weights: dict[int, np.ndarray]
    weight: np.ndarray
    seams: np.ndarray
    prompt: np.ndarray
    side: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def lengths(self) -> np.ndarray:
        """`[R]`, tokens of each row."""
        return np.diff(self.offsets)

    def per_row(self, marked: np.ndarray) -> np.ndarray:
        """How many tokens of each row are marked: `[T]` bool -> `[R]`."""
        sums = np.concatenate([[0], np.cumsum(marked)])
        return sums[self.offsets[1:]] - sums[self.offsets[:-1]]


class TokenStore:
    """Rows of tokens, in memory or in a memory-mapped file.

    Args:
      batches: record batches of `SCHEMA`.
      facts: what was found out while the rows were read (format, skipped rows, notes); JSON values.
    """

    def __init__(self, batches: Iterable[pa.RecordBatch], facts: dict[str, Any] | None = None):
        self._batches = [batch for batch in batches if batch.num_rows]
        self._starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)])
        self.facts = facts or {}

    @classmethod
    def open(cls, path: Path, facts: dict[str, Any]) -> TokenStore:
        """Maps a file that `write` made."""
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return cls((reader.get_batch(index) for index in range(reader.num_record_batches)), facts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Tokens:
        """One row."""
        batch, row = self._find(index)
        arrays: dict[str, Any] = {name: _numpy(batch.column(name)[row].values) for name in _ARRAYS}
        numbers = {name: batch.column(name)[row].as_py() for name in ("seams", "weight", "side", "answer")}
        turn_weights = tuple(_numpy(batch.column("turn_weights")[row].values).tolist())
        weights = batch.column("weights")[row].values
        given = None if weights is None else _numpy(weights)
        return Tokens(**arrays, **numbers, turn_weights=turn_weights, weights=given)

    @property
    def sides(self) -> np.ndarray:
        """How each row's answer is judged: `[N]` int8, values of `Side`."""
        return np.concatenate([np.zeros(0, np.int8), *(_numpy(batch.column("side")) for batch in self._batches)])

    def source(self, index: int) -> str:
        """File and row number of one row."""
        batch, row = self._find(index)
        return batch.column("source")[row].as_py()

    def _find(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[number], index - int(self._starts[number])

    def flat(self) -> Iterable[FlatRows]:
        """All rows, some hundred at a time."""
        for batch in self._batches:
            weights, turn_weights = batch.column("weights"), batch.column("turn_weights")
            given = np.flatnonzero(_numpy(weights.is_valid().cast(pa.uint8()))).tolist()
            yield FlatRows(
                offsets=_numpy(batch.column("input_ids").offsets),
                turn_offsets=_numpy(turn_weights.offsets),
                turn_weights=_numpy(turn_weights.values),
                token_weights={row: _numpy(weights[row].values) for row in given},
                **{name: _numpy(batch.column(name).values) for name in _ARRAYS},
                **{name: _numpy(batch.column(name)) for name in ("weight", "seams", "prompt", "side", "answer")},
            )


def _numpy(array: pa.Array) -> np.ndarray:
    """The numbers of an array without nulls, where they are."""
    return np.from_dlpack(array)


def write(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes record batches to a file, one after the other: only one is in memory at a time."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
