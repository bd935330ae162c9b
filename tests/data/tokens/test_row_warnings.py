"""Rows that look as if something went wrong are trained on, and named."""

from __future__ import annotations

import pytest

from mora_jax.data import Conversation, EncodedDataset, Message, Passage
from mora_jax.data.sources import build_store
from mora_jax.data.tokens.encode import ODDITIES, RowEncoder, notes, oddities


def talk(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, words) for role, words in turns))


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (talk(("system", "s"), ("user", "a"), ("assistant", "b")), []),
        (talk(("user", "a"), ("assistant", "b"), ("user", "c")), ["unanswered"]),
        (talk(("user", "a")), []),  # a row without any answer is dropped, or all instruction
        (talk(("user", "a"), ("user", "b"), ("assistant", "c")), ["repeated_role"]),
        (talk(("user", "a"), ("assistant", "b"), ("tool", "c"), ("tool", "d"), ("assistant", "e")), []),
        (talk(("user", "a"), ("system", "s"), ("assistant", "b")), ["late_system"]),
        (talk(("user", " \n"), ("assistant", "b")), ["empty_turn"]),
        (Conversation(text=""), []),
        (Conversation(text="[INST] a [/INST] b"), ["chat_markup"]),
        (Conversation(text="### Human: a### Assistant: b"), ["chat_markup"]),
        (Conversation(text="a word of ### human"), []),
        (Passage((("a", 1.0),)), []),
    ],
)
def test_what_is_odd(row, found):
    assert list(oddities(row)) == found


def test_a_call_without_words_is_no_empty_turn():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = (Message("user", "a"), Message("assistant", "", tool_calls=(call,)))
    assert list(oddities(Conversation(turns))) == []


def test_notes_of_a_data_set(make_tokenizer):
    rows = [talk(("user", "a"), ("assistant", "b"), ("user", "c"))] * 3 + [talk(("user", "a"), ("assistant", "b"))]
    encoder = RowEncoder(make_tokenizer("byte_level", "chatml"))
    store = build_store(encoder, [("", row) for row in rows], {"notes": ["first"]})
    assert EncodedDataset(store).report.notes == ["first", f"3 {ODDITIES['unanswered']}"]
    assert notes({}) == []
