"""Checks answers of the demo: exact match and word F1, in the manner of SQuAD.

Unlike SQuAD's, the normalisation keeps case and articles, because some questions ask
for them (`Write egg in capitals.`).
"""

import re
from collections import Counter

_WORD = re.compile(r"\w+|[^\w\s]")


def normalise(text: str) -> str:
    """Puts one space between words, none around the text, and removes a last full stop."""
    return " ".join(text.split()).removesuffix(".").rstrip()


def exact_match(answer: str, truth: str) -> float:
    """1.0 where both are the same after `normalise`, else 0.0."""
    return float(normalise(answer) == normalise(truth))


def word_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words, each counted as often as it occurs.

    Punctuation doesn't count. The order of words doesn't either, so a list that was copied
    instead of reversed has an F1 of 1 and an exact match of 0.
    """
    got, wanted = (
        Counter(word for word in _WORD.findall(normalise(text)) if word.isalnum()) for text in (answer, truth)
    )
    shared = sum((got & wanted).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / sum(got.values()), shared / sum(wanted.values())
    return 2 * precision * recall / (precision + recall)


def mean_scores(answers: list[str], truths: list[str]) -> tuple[float, float]:
    """Mean exact match and mean F1 of answers to questions."""
    pairs = list(zip(answers, truths, strict=True))
    return (
        sum(exact_match(*pair) for pair in pairs) / len(pairs),
        sum(word_f1(*pair) for pair in pairs) / len(pairs),
    )
