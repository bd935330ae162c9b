"""Rows in memory: what counts as the same rows, and tables whose cells are arrays."""

from __future__ import annotations

import numpy as np
import pytest

from mora_jax.data import Message, load_rows
from mora_jax.data.read.locate import MemoryRows


def called(**arguments):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}]


def digest(rows):
    return MemoryRows(rows).digest()


def test_other_rows_have_another_digest():
    # A template writes arguments in their order.
    assert digest(called(a=1, b=2)) != digest(called(b=2, a=1))
    assert digest(called(a=1, b=2)) == digest(called(a=1, b=2))
    # Numpy writes long arrays with dots in their middle.
    ids = np.arange(5000)
    assert digest([{"input_ids": ids}]) != digest([{"input_ids": np.where(ids == 2500, 1, ids)}])
    assert digest([{"input_ids": ids}]) == digest([{"input_ids": ids.tolist()}])


def test_tables_with_arrays_in_their_cells():
    pandas = pytest.importorskip("pandas")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table = pandas.DataFrame({"messages": [np.array(turns, object)], "weight": [np.float32(0.5)]})
    [row] = load_rows(table)
    assert row.messages == (Message("user", "q"), Message("assistant", "a")) and row.weight == 0.5
    [row] = load_rows([{"input_ids": np.array([1, 2, 3]), "labels": np.array([-100, 2, 3])}])
    assert row.input_ids == (1, 2, 3) and row.weights == (0.0, 1.0, 1.0)
    [row] = load_rows(pandas.DataFrame([{"input_ids": [np.int64(1), np.int64(2)], "weights": [np.float32(0), 1.0]}]))
    assert row.input_ids == (1, 2) and row.weights == (0.0, 1.0)
