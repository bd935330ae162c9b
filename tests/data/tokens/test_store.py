"""Rows as record batches."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from mora_jax.data.tokens.store import SCHEMA, TokenStore, make_batch, prompt_hash
from mora_jax.data.tokens.tokenize import Tokens


def row(ids: list[int], **others) -> Tokens:
    size = len(ids)
    return Tokens(np.array(ids, np.int32), np.ones(size, np.int8), np.zeros(size, np.int16), **others)


ROWS = [
    (row([5, 6, 7], turn_weights=(0.5, float("nan")), weights=np.array([1, 0, 0.25], np.float32)), "ä \u2028 1"),
    (row([]), ""),
    (row([9], seams=3, weight=2.5, side=-1, answer=1), "b 2"),
    (row([1, 2], weights=np.zeros(2, np.float32)), "b 3"),
]


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:2], ROWS[1:], []], ids=["all", "empty row", "rest", "none"])
def test_a_batch_is_what_arrow_makes_of_lists(rows):
    columns = {"prompt": [prompt_hash(tokens) for tokens, _ in rows], "source": [source for _, source in rows]}
    for name in set(SCHEMA.names) - columns.keys():
        columns[name] = [getattr(tokens, name) for tokens, _ in rows]
    batch = make_batch(rows)
    batch.validate(full=True)
    for field in SCHEMA:
        expected = pa.array(columns[field.name], field.type)
        assert repr(batch.column(field.name).to_pylist()) == repr(expected.to_pylist()), field.name  # NaN is itself


def test_rows_come_back_one_by_one_and_together(tmp_path):
    store = TokenStore([make_batch(ROWS), make_batch(ROWS[2:])])
    assert [store[i].input_ids.tolist() for i in range(6)] == [[5, 6, 7], [], [9], [1, 2], [9], [1, 2]]
    assert [store[i].weights is None for i in range(6)] == [False, True, True, False, True, False]
    assert store.source(0) == "ä \u2028 1" and store.sides.tolist() == [0, 0, -1, 0, -1, 0]
    first, second = store.flat()
    assert {key: value.tolist() for key, value in first.token_weights.items()} == {0: [1, 0, 0.25], 3: [0, 0]}
    assert first.offsets.tolist() == [0, 3, 3, 4, 6] and second.input_ids.tolist() == [9, 1, 2]


def test_no_batch_imports_pandas():
    code = """if True:
        import sys
        import numpy as np
        from mora_jax.data.tokens.store import TokenStore, make_batch
        from mora_jax.data.tokens.tokenize import Tokens
        rows = [(Tokens(np.ones(2, np.int32), np.ones(2, np.int8), np.ones(2, np.int16)), "a 1")]
        store = TokenStore([make_batch(rows)])
        store[0], store.sides, list(store.flat())
        assert "pandas" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
