"""Rows of every kind to tokens: one call of the tokenizer for many rows, and an error a row where one is bad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite, nan

import numpy as np

from mora_jax.data.conversation import Conversation, Passage, Row, TokenRow
from mora_jax.data.segments import Rendered, Segment
from mora_jax.data.templates.render import Renderer
from mora_jax.data.tokens.tokenize import Tokens, tokenize
from mora_jax.errors import InputError

_LARGEST_ID = np.iinfo(np.int32).max


def tokenize_rows(rows: Sequence[Row], renderer: Renderer) -> list[Tokens | InputError]:
    """Tokenises rows, all that have text in one call.

    Args:
      rows: conversations, passages and rows of ids, in any mixture.
      renderer: template and tokenizer.

    Returns:
      For each row its tokens, or what is wrong with it: the caller raises the first or skips and counts them.
    """
    results: list[Tokens | InputError] = []
    rendered: list[Rendered] = []
    places: list[int] = []
    for place, row in enumerate(rows):
        try:
            if isinstance(row, TokenRow):
                results.append(_from_ids(row, renderer.tokenizer.bos_token_id))
                continue
            rendered.append(renderer.render(row))
        except InputError as error:
            results.append(error)
            continue
        places.append(place)
        results.append(_NOT_YET)
    for place, tokens in zip(places, tokenize(rendered, renderer.tokenizer), strict=True):
        results[place] = _weighed(tokens, rows[place])
    return results


_NOT_YET = InputError("not tokenised yet")


def _weighed(tokens: Tokens, row: Row) -> Tokens:
    """The tokens with what the data says of their weights."""
    turn_weights: tuple[float, ...] = ()
    if isinstance(row, Passage):
        turn_weights = tuple(weight for _, weight in row.parts)
    elif isinstance(row, Conversation) and any(message.weight is not None for message in row.messages):
        turn_weights = tuple(nan if m.weight is None else m.weight for m in row.messages)
    if not turn_weights and row.weight == 1.0:
        return tokens
    return replace(tokens, turn_weights=turn_weights, weight=row.weight)


def _from_ids(row: TokenRow, bos: int | None) -> Tokens:
    """The tokens of a row that was tokenised elsewhere."""
    where = f"{row.source}: " if row.source else ""
    wrong = next((i for i, token in enumerate(row.input_ids) if not 0 <= token <= _LARGEST_ID), None)
    if wrong is not None:
        raise InputError(
            f"{where}`input_ids[{wrong}]` is {row.input_ids[wrong]}, which is no token's id; ids are 0 or more"
        )
    given = row.weights if row.weights is not None else (1.0,) * len(row.input_ids)
    if len(given) != len(row.input_ids):
        raise InputError(
            f"{where}there are {len(row.input_ids)} `input_ids` and {len(given)} weights; give one weight an id"
        )
    wrong = next((i for i, weight in enumerate(given) if not (isfinite(weight) and weight >= 0)), None)
    if wrong is not None:
        raise InputError(f"{where}`weights[{wrong}]` is {given[wrong]}; a weight is a number of 0 or more")
    weights = np.array(given, np.float32)
    segments = np.where(weights > 0, Segment.ASSISTANT, Segment.USER).astype(np.int8)
    turns = np.zeros(len(given), np.int16)
    if bos is not None and row.input_ids[:1] == (bos,):
        segments[0], turns[0] = Segment.BOS, -1
    return Tokens(np.array(row.input_ids, np.int32), segments, turns, weights=weights, weight=row.weight)
