"""Streaming text: whole characters only, and nothing lost."""

from operator import length_hint

import pytest

from mora_jax.evaluation.chat import REPLACEMENT, decode_stream


@pytest.mark.parametrize("text", ["plain words", "naïve café", "日本語 and 🙂🏽 faces", "", " leading", "\n\ntwo\n"])
def test_pieces_join_to_the_text_and_hold_no_broken_character(tokenizer, text):
    pieces = list(decode_stream(tokenizer, tokenizer(text)["input_ids"]))
    assert "".join(pieces) == text
    assert all(REPLACEMENT not in piece for piece in pieces)


def test_text_is_given_out_as_soon_as_it_is_whole(tokenizer):
    ids = tokenizer("aé")["input_ids"]
    tokens = iter(ids)
    pieces = [(piece, length_hint(tokens)) for piece in decode_stream(tokenizer, tokens)]
    assert len(ids) == 3
    assert pieces == [("a", 2), ("é", 0)], "each with the tokens that are still to come"


def test_an_unfinished_character_is_dropped_at_the_end(tokenizer):
    ids = tokenizer("ok🙂")["input_ids"][:-1]
    assert "".join(decode_stream(tokenizer, ids)) == "ok"


def test_special_tokens_do_not_show(tokenizer):
    ids = tokenizer("<|user|>hi<|end|>")["input_ids"]
    assert "".join(decode_stream(tokenizer, ids)) == "hi"
