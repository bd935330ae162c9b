"""Segments with labels, and token ids with labels or weights."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from mora_jax.data import Passage, TokenRow
from mora_jax.data.formats.column_mapping import Mapping
from mora_jax.data.formats.registry import read_segments, read_tokens
from mora_jax.errors import InputError

NAN = float("nan")


def tokens(**row):
    [result] = read_tokens(row, "r", Mapping())
    return result


@pytest.mark.parametrize(("label", "weight"), [(True, 1.0), (False, 0.0), (0, 0.0), (1, 1.0), (0.3, 0.3)])
def test_labels_of_segments(label, weight):
    [result] = read_segments({"segments": [{"text": " a\n", "label": label}]}, "r", Mapping())
    assert result == Passage(((" a\n", weight),), "r")


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (None, "r: `segments` should be a filled list and is missing or null"),
        ([], "r: `segments` should be a filled list and is empty"),
        ([None], r"r: `segments\[0\]` should be an object with `text` and `label`, and is missing or null"),
        ([{"label": True}], r"r: `segments\[0\].text` should be text and is missing or null"),
        ([{"text": "a"}], r"r: `segments\[0\].label` is missing or null; expected true, false or a weight"),
        ([{"text": "a", "label": None}], r"r: `segments\[0\].label` is missing or null"),
        ([{"text": "a", "label": "good"}], r"r: `segments\[0\].label` is 'good'; expected true, false or"),
        ([{"text": "a", "label": NAN}], r"r: `segments\[0\].label` is nan; expected a weight"),
        ([{"text": "a", "label": -1}], r"r: `segments\[0\].label` is -1; expected a weight"),
        ([{"text": "\ud800", "label": 1}], r"r: `segments\[0\].text` holds a lone surrogate"),
    ],
)
def test_broken_segments(segments, message):
    with pytest.raises(InputError, match=message):
        list(read_segments({"segments": segments}, "r", Mapping()))


@settings(deadline=None)
@given(st.data())
def test_labels_say_which_ids_are_trained(data):
    ids = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
    trained = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    left, right = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    labels = [token if here else -100 for token, here in zip(ids, trained, strict=True)]
    result = tokens(
        input_ids=[0] * left + ids + [0] * right,
        labels=[-100] * left + labels + [-100] * right,
        attention_mask=[0] * left + [1] * len(ids) + [0] * right,
    )
    assert result == TokenRow(tuple(ids), tuple(map(float, trained)), "r")


def test_ids_alone_and_json_text():
    assert tokens(input_ids=[1, 2], labels=None, weights=None, attention_mask=None) == TokenRow((1, 2), None, "r")
    assert tokens(input_ids="[1, 2]", weights="[0, 1.5]") == TokenRow((1, 2), (0.0, 1.5), "r")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "`input_ids` should be a filled list and is missing or null"),
        ({"input_ids": []}, "`input_ids` should be a filled list and is empty"),
        ({"input_ids": [1, None]}, r"`input_ids\[1\]` is None; expected a token id, a whole number from 0 to"),
        ({"input_ids": [1, 2.0]}, r"`input_ids\[1\]` is 2.0; expected a token id"),
        ({"input_ids": [1, "2"]}, r"`input_ids\[1\]` is '2'; expected a token id"),
        ({"input_ids": [True, 2]}, r"`input_ids\[0\]` is True; expected a token id"),
        ({"input_ids": [1, -1]}, r"`input_ids\[1\]` is -1; expected a token id"),
        ({"input_ids": [2**31]}, r"`input_ids\[0\]` is 2147483648; expected a token id"),
        ({"input_ids": [[1, 2]]}, r"`input_ids\[0\]` is \[1, 2\]; expected a token id"),
        ({"input_ids": [1, 2], "labels": [1, 2, 3]}, "`labels` has 3 entries for 2 `input_ids`; expected one for each"),
        ({"input_ids": [1, 2], "labels": [1]}, "`labels` has 1 entries for 2 `input_ids`"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, r"`labels\[1\]` is 3; expected `input_ids\[1\]`, which is 2, or"),
        ({"input_ids": [1, 2], "labels": [1, None]}, r"`labels\[1\]` is None; expected a token id"),
        ({"input_ids": [1, 2], "labels": [-1, 2]}, r"`labels\[0\]` is -1; expected `input_ids\[0\]`"),
        ({"input_ids": [1, 2], "labels": [-101, 2]}, r"`labels\[0\]` is -101; expected a token id"),
        ({"input_ids": [1, 2], "weights": [1]}, "`weights` has 1 entries for 2 `input_ids`"),
        ({"input_ids": [1, 2], "weights": [1, 1, 1]}, "`weights` has 3 entries for 2 `input_ids`"),
        ({"input_ids": [1, 2], "weights": [1, NAN]}, r"`weights\[1\]` is nan; expected a weight"),
        ({"input_ids": [1, 2], "weights": [-0.5, 1]}, r"`weights\[0\]` is -0.5; expected a weight"),
        ({"input_ids": [1, 2], "weights": [1, None]}, r"`weights\[1\]` should be a number and is missing or null"),
        ({"input_ids": [1, 2], "weights": [1, True]}, r"`weights\[1\]` should be a number and is a boolean"),
        ({"input_ids": [1], "weights": [1], "labels": [1]}, "both `labels` and `weights`; keep one"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "`attention_mask` has 1 entries for 2 `input_ids`"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "`attention_mask` leaves no token"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "`attention_mask` should be ones with zeros at an end"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "`attention_mask` should be ones with zeros at an end"),
    ],
)
def test_broken_tokens(row, message):
    with pytest.raises(InputError, match="^r: .*" + message):
        tokens(**row)
