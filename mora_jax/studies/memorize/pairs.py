"""Random pairs of keys and values to be memorised, after MoRA's UUID pairs (arXiv 2405.12130, section 3).

A UUID has fixed digits, which any method learns at once; here all symbols are uniform. They are sixteen letters set
apart by spaces, four bits each, so that most tokenizers make one token of each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

SYMBOLS = "abcdefghijklmnop"
BITS = 4


def make_pairs(count: int, length: int, seed: int) -> list[dict[str, str]]:
    """Rows with a `prompt`, the key, and a `completion`, the value.

    Args:
        count: pairs; no key occurs twice.
        length: symbols of a key, and of a value.
        seed: of the draw.
    """
    draw = random.Random(f"pairs {seed}")
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[" ".join(draw.choices(SYMBOLS, k=length))] = None
    return [{"prompt": key, "completion": " ".join(draw.choices(SYMBOLS, k=length))} for key in keys]


def right_symbols(answer: str, truth: str) -> tuple[int, int]:
    """How many symbols of a value an answer has right, position by position, of how many; missing ones are wrong.

    >>> right_symbols("a b c", "a c c d")
    (2, 4)
    """
    wanted, got = truth.split(), answer.split()
    return sum(one == other for one, other in zip(got, wanted, strict=False)), len(wanted)


def share_of_right(answers: Sequence[str], truths: Sequence[str]) -> tuple[float, float]:
    """The share of right symbols over all pairs, and of pairs that are right whole."""
    found = [right_symbols(answer, truth) for answer, truth in zip(answers, truths, strict=True)]
    right, every = (sum(column) for column in zip(*found, strict=True))
    return right / every, sum(one == other for one, other in found) / len(found)
