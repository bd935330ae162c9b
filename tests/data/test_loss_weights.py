"""Loss modes and policies, token by token on a conversation that is small enough to do by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mora_jax.data import MODES, LossWeights, Segment, token_weights
from mora_jax.data.examples import flat_weights
from mora_jax.data.tokens.store import TokenStore, make_batch
from mora_jax.data.tokens.tokenize import Tokens
from mora_jax.errors import InputError

S = Segment
# BOS, a preamble, then system, user, assistant (a call), tool, assistant (thought and answer): each turn has a header,
# one or two words and an end.
TOY = [
    (S.BOS, -1),
    (S.TEMPLATE, -1),
    (S.HEADER, 0),
    (S.SYSTEM, 0),
    (S.CLOSING, 0),
    (S.HEADER, 1),
    (S.USER, 1),
    (S.USER, 1),
    (S.CLOSING, 1),
    (S.HEADER, 2),
    (S.TOOL_CALL, 2),
    (S.END_OF_TURN, 2),
    (S.HEADER, 3),
    (S.TOOL, 3),
    (S.CLOSING, 3),
    (S.HEADER, 4),
    (S.REASONING, 4),
    (S.ASSISTANT, 4),
    (S.END_OF_TURN, 4),
    (S.TEMPLATE, -1),
]


def toy(turn_weights=(), weights=None):
    segments, turns = zip(*TOY, strict=True)
    count = len(TOY)
    return Tokens(
        np.arange(count, dtype=np.int32),
        np.array(segments, np.int8),
        np.array(turns, np.int16),
        turn_weights=turn_weights,
        weights=None if weights is None else np.array(weights, np.float32),
    )


def written(tokens, **settings):
    """The weights as text, one character a token: 0, 1 or h for a half."""
    marks = {0.0: "0", 1.0: "1", 0.5: "h"}
    return "".join(marks[weight] for weight in token_weights(tokens, LossWeights(**settings)).tolist())


#            BT hsc huuc hae htc hrae T
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mode": "masked"}, "00 000 0000 011 000 0111 0"),
        ({"mode": "unmasked"}, "00 010 0110 011 010 0111 0"),
        ({"mode": "full"}, "01 111 1111 111 111 1111 1"),
        ({"mode": "im_paper"}, "01 111 1111 111 111 1111 1"),
        ({"mode": "weighted", "prompt_weight": 0.5}, "00 0h0 0hh0 011 0h0 0111 0"),
        ({"mode": "wit", "prompt_weight": 0.5}, "0h hhh hhhh h11 hhh h111 h"),
        ({"mode": "last_turn"}, "00 000 0000 000 000 0111 0"),
        ({"roles": ("user",)}, "00 000 0111 000 000 0000 0"),
        ({"roles": ("assistant", "tool")}, "00 000 0000 011 011 0111 0"),
        ({"mode": "last_turn", "roles": ("tool", "user")}, "00 000 0000 000 011 0000 0"),
        ({"end_of_turn": "all"}, "00 001 0001 011 001 0111 0"),
        ({"end_of_turn": "last"}, "00 000 0000 010 000 0111 0"),
        ({"end_of_turn": "none"}, "00 000 0000 010 000 0110 0"),
        ({"end_of_turn": "turn"}, "00 000 0000 011 000 0111 0"),
        ({"mode": "unmasked", "end_of_turn": "turn"}, "00 011 0111 011 011 0111 0"),
        ({"headers": "turn"}, "00 000 0000 111 000 1111 0"),
        ({"headers": "all"}, "00 100 1000 111 100 1111 0"),
        ({"mode": "full", "headers": "none"}, "01 011 0111 011 011 0111 1"),
    ],
)
def test_modes_and_policies(settings, expected):
    assert written(toy(), **settings) == expected.replace(" ", "")


NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "turn_weights", "expected"),
    [
        ({}, (NAN, NAN, 0.0, NAN, 1.0), "00 000 0000 000 000 0111 0"),
        ({}, (NAN, NAN, NAN, NAN, 0.5), "00 000 0000 011 000 0hhh 0"),
        ({"mode": "full"}, (NAN, NAN, 0.0), "01 111 1111 100 111 1111 1"),
        # A turn that the data asks for is trained although the mode leaves it out, and its end with it.
        ({}, (NAN, 1.0), "00 000 0111 011 000 0111 0"),
        ({"mode": "last_turn"}, (NAN, NAN, 0.5), "00 000 0000 0hh 000 0111 0"),
        ({"mode": "unmasked"}, (NAN, 0.5), "00 010 0hh0 011 010 0111 0"),
        ({"end_of_turn": "none"}, (NAN, NAN, 0.5), "00 000 0000 0h0 000 0110 0"),
    ],
)
def test_weights_of_messages_win_over_the_mode(settings, turn_weights, expected):
    assert written(toy(turn_weights), **settings) == expected.replace(" ", "")


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_tokens_win_over_all(mode):
    given = np.arange(len(TOY)) % 3
    np.testing.assert_array_equal(token_weights(toy(weights=given), LossWeights(mode)), given)


@pytest.mark.parametrize("mode", MODES)
def test_first_token_is_never_predicted(mode):
    tokens = Tokens(np.zeros(3, np.int32), np.full(3, S.ASSISTANT, np.int8), np.zeros(3, np.int16))
    weights = token_weights(tokens, LossWeights(mode))
    np.testing.assert_array_equal(weights, [0, 1, 1])
    assert weights.dtype == np.float32


def test_no_tokens():
    nothing = Tokens(np.zeros(0, np.int32), np.zeros(0, np.int8), np.zeros(0, np.int16))
    assert token_weights(nothing).shape == (0,)


def test_many_rows_at_once_weigh_what_each_weighs_alone():
    short = Tokens(np.zeros(2, np.int32), np.array([S.USER, S.ASSISTANT], np.int8), np.array([0, 1], np.int16))
    empty = Tokens(np.zeros(0, np.int32), np.zeros(0, np.int8), np.zeros(0, np.int16))
    rows = [toy(), empty, toy((NAN, 0.5, 0.0)), short, toy(weights=np.ones(len(TOY))), toy((NAN,) * 4 + (0.5,))]
    [flat] = TokenStore([make_batch([(row, "") for row in rows])]).flat()
    for mode in MODES:
        for ends in (None, "all", "last", "none", "turn"):
            for headers in (None, "turn", "all"):
                loss = LossWeights(mode, 0.3, end_of_turn=ends, headers=headers)
                alone = np.concatenate([token_weights(row, loss) for row in rows])
                np.testing.assert_array_equal(flat_weights(flat, loss), alone)


def test_weighted_at_its_ends_is_masked_and_unmasked():
    assert LossWeights("weighted", 0.0).table == LossWeights("masked").table
    assert LossWeights("weighted", 1.0).table == LossWeights("unmasked").table


@pytest.mark.parametrize("weight", [-0.1, 1.01, float("nan")])
def test_prompt_weight_outside_its_range(weight):
    with pytest.raises(InputError, match="prompt_weight .* between 0 and 1"):
        LossWeights("weighted", weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "maskd"}, "unknown loss mode 'maskd'.*masked, unmasked, full, weighted"),
        ({"roles": ("bot",)}, "unknown role 'bot'"),
        ({"end_of_turn": "some"}, "unknown end_of_turn 'some'"),
        ({"headers": "some"}, "unknown headers 'some'"),
    ],
)
def test_unknown_names(settings, message):
    with pytest.raises(InputError, match=message):
        LossWeights(**settings)
