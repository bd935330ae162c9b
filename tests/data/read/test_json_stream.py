"""A JSON list read piece by piece gives what the standard library gives for the whole."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from mora_jax.data.read.files import ListReader, TextReader
from mora_jax.errors import InputError

PATH = Path("a.json")


def read(text, piece=1 << 18):
    return list(ListReader(io.StringIO(text).read, PATH, piece))


def values(text, piece=1 << 18):
    return [value for _, value in read(text, piece)]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(deadline=None)
@given(
    st.lists(JSON, max_size=6),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.integers(1, 40),
    st.sampled_from(" \t\r\n"),
)
def test_any_list_in_pieces_of_any_size(rows, indent, ascii_only, piece, space):
    text = space + json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + space
    assert read(text, piece) == list(enumerate(rows, start=1))
    data = io.BytesIO(text.encode())
    assert list(ListReader(TextReader(data, PATH).read, PATH, piece)) == list(enumerate(rows, start=1))


@settings(deadline=None)
@given(st.lists(JSON, min_size=1, max_size=4), st.integers(1, 40), st.data())
def test_a_list_that_was_cut_is_never_read_as_whole(rows, piece, data):
    text = json.dumps(rows)
    with pytest.raises(InputError, match=r"a\.json, line 1, column \d+: broken JSON"):
        read(text[: data.draw(st.integers(1, len(text) - 1))], piece)


@pytest.mark.parametrize("piece", [1, 7, 1 << 18])
@pytest.mark.parametrize(
    ("text", "line", "column", "reason"),
    [
        ('[{"a": 1},', 1, 11, "the file ends in the middle of a value"),
        ('[{"a": 1}', 1, 10, "the file ends in the middle of a value"),
        ('[\n {"a": "b', 2, 8, "the file ends in the middle of a value"),
        ('[\n{"a": 1}\n {"a": 2}]', 3, 2, "Expecting ',' delimiter"),
        ('[{"a": 1},\n{"a" 2}, {"a": "long enough to be read in several pieces"}]', 2, 6, "Expecting ':' delimiter"),
        ('[{"a": 1}]\n\n [', 3, 2, "Extra data"),
        ('[{"a": 1},]', 1, 11, "a comma after the last element"),
        ('[\n\n{"a": "b\n"}]', 3, 9, "Invalid control character at"),
        ('["\\x"]', 1, 3, "Invalid \\escape"),
        ("[nul]", 1, 2, "Expecting value"),
    ],
)
def test_where_it_is_broken(text, line, column, reason, piece):
    with pytest.raises(InputError) as caught:
        read(text, piece)
    assert str(caught.value).startswith(f"a.json, line {line}, column {column}: broken JSON ({reason}")


def test_what_comes_before_the_break_is_given():
    reader = iter(ListReader(io.StringIO('[{"a": 1}, {"a": 2}, oops' + " " * 100 + "]").read, PATH, 1))
    assert [next(reader), next(reader)] == [(1, {"a": 1}), (2, {"a": 2})]
    with pytest.raises(InputError, match="column 22"):
        next(reader)


@pytest.mark.parametrize("number", ["9" * 5000, "[" * 200_000])
def test_values_that_python_refuses(number):
    with pytest.raises(InputError, match="a.json, line 2: JSON (that cannot be read|nested too deeply)"):
        read(f"[1,\n{number}]")


def test_the_time_grows_with_the_size_of_a_row_and_no_faster():
    def seconds(size):
        text = json.dumps([{"text": "x" * size}])
        start = time.perf_counter()
        [row] = values(text, 1024)
        assert len(row["text"]) == size
        return time.perf_counter() - start

    seconds(1000)
    # 16 times the size: 256 times as long if every piece were read anew from the row's beginning.
    assert min(seconds(1 << 24) for _ in range(3)) < 80 * max(min(seconds(1 << 20) for _ in range(3)), 1e-3)


def test_only_what_is_at_hand_is_kept():
    row = json.dumps({"text": "x" * 1000})
    reader = ListReader(io.StringIO("[" + ",".join([row] * 5000) + "]").read, PATH, 4096)
    assert max(len(reader._text) for _ in reader) < 4 * 4096
