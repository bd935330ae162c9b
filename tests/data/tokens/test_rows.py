"""Rows of every kind to tokens, and what is wrong with rows that cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from mora_jax.data import (
    Conversation,
    LossWeights,
    Message,
    Passage,
    Renderer,
    Segment,
    TokenRow,
    Tokens,
    token_weights,
)
from mora_jax.data.tokens.encode import tokenize_rows
from mora_jax.errors import InputError

B, U, A, E = Segment.BOS, Segment.USER, Segment.ASSISTANT, Segment.END_OF_TURN
ASKED = Message("user", "How are you?")
SAID = Message("assistant", "fine")


def tokenized(row, tokenizer, template="chatml"):
    [tokens] = tokenize_rows([row], Renderer(tokenizer, template))
    assert isinstance(tokens, Tokens), tokens
    return tokens


def test_rows_of_all_kinds_in_their_order(make_tokenizer):
    tokenizer = make_tokenizer("metaspace")
    rows = [
        TokenRow((5, 6, 7)),
        Conversation((ASKED, SAID)),
        Passage((("a", 0.0), ("b", 1.0))),
        Conversation((ASKED, Message("assistant", "", tool_calls=({"function": {"name": "f"}},))), source="f, row 4"),
        Conversation(text="a"),
        TokenRow((9,), source="f, row 6"),
    ]
    found = tokenize_rows(rows, Renderer(tokenizer, "llama3"))
    assert [type(one) for one in found] == [Tokens, Tokens, Tokens, InputError, Tokens, Tokens]
    assert str(found[3]).startswith("f, row 4: ")
    for row, one in zip(rows, found, strict=True):
        if isinstance(one, Tokens):
            np.testing.assert_array_equal(one.input_ids, tokenized(row, tokenizer, "llama3").input_ids)
    assert tokenize_rows([], Renderer(tokenizer, "llama3")) == []


def test_weights_of_messages_and_rows(make_tokenizer):
    tokenizer = make_tokenizer("byte_level")
    plain = tokenized(Conversation((ASKED, SAID)), tokenizer)
    assert plain.turn_weights == () and plain.weight == 1.0
    row = Conversation((ASKED, Message("assistant", "fine", weight=0.5)), weight=2.0)
    weighed = tokenized(row, tokenizer)
    assert np.isnan(weighed.turn_weights[0]) and weighed.turn_weights[1] == 0.5
    assert weighed.weight == 2.0
    weights = token_weights(weighed, LossWeights())
    assert set(weights[np.isin(weighed.segments, (A, E))]) == {0.5}
    assert not weights[~np.isin(weighed.segments, (A, E))].any()


def test_a_passage_is_joined_as_it_stands_with_the_weight_of_each_part(make_tokenizer):
    tokenizer = make_tokenizer("byte_level")
    row = Passage((("The answer", 0.0), (" is", 0.5), ("", 1.0), (" yes.", 1.0)))
    tokens = tokenized(row, tokenizer)
    assert tokenizer.decode(tokens.input_ids.tolist()) == "The answer is yes."
    assert tokens.turn_weights == (0.0, 0.5, 1.0, 1.0)
    assert set(tokens.turns) == {0, 1, 3}
    assert [tokens.segments[tokens.turns == turn][0] for turn in (0, 1, 3)] == [U, A, A]
    for mode in ("masked", "full"):
        weights = token_weights(tokens, LossWeights(mode))
        assert [set(weights[tokens.turns == turn][-1:]) for turn in (0, 1, 3)] == [{0.0}, {0.5}, {1.0}]


def test_ids_that_were_made_elsewhere(make_tokenizer):
    bos = make_tokenizer("metaspace").bos_token_id
    tokens = tokenized(TokenRow((bos, 5, 6, 7), (1.0, 0.0, 0.5, 1.0), weight=3.0), make_tokenizer("metaspace"))
    assert tokens.input_ids.tolist() == [bos, 5, 6, 7] and tokens.input_ids.dtype == np.int32
    assert tokens.segments.tolist() == [B, U, A, A]
    assert tokens.turns.tolist() == [-1, 0, 0, 0]
    assert tokens.weight == 3.0
    assert token_weights(tokens).tolist() == [0.0, 0.0, 0.5, 1.0]
    assert token_weights(tokenized(TokenRow((5, 6)), make_tokenizer("metaspace"))).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (TokenRow((1, -1), source="f, row 2"), r"^f, row 2: `input_ids\[1\]` is -1"),
        (TokenRow((1, 2**31)), r"^`input_ids\[1\]` is 2147483648"),
        (TokenRow((1, 2), (1.0,), source="r"), "^r: there are 2 `input_ids` and 1 weights"),
        (TokenRow((1, 2), (1.0, -1.0)), r"`weights\[1\]` is -1.0"),
        (TokenRow((1, 2), (float("nan"), 1.0)), r"`weights\[0\]` is nan"),
        (Passage((("a", 1.0),) * 40_000, source="r"), "^r: 40000 turns are too many"),
    ],
)
def test_rows_that_cannot_be_used(row, message, make_tokenizer):
    [error] = tokenize_rows([row], Renderer(make_tokenizer("byte_level"), "chatml"))
    with pytest.raises(InputError, match=message):
        raise error
