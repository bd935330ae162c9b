"""Checks of generated answers: exact match and F1 as in SQuAD, numbers as in GSM8K, pass@k."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def squad_normalise(text: str) -> str:
    """Lower case, no punctuation (nothing in its place), no articles, one space between words.

    The order is that of SQuAD's own script (`metrics/squad/compute_score.py` of huggingface/evaluate).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_exact_match(answer: str, truths: Sequence[str]) -> float:
    """1.0 where the answer is one of the right ones, but for what `squad_normalise` removes; else 0.0."""
    return float(squad_normalise(answer) in {squad_normalise(truth) for truth in truths})


def squad_f1(answer: str, truths: Sequence[str], *, empty_is_correct: bool = False) -> float:
    """The best F1 over words with one of the right answers, each word counted as often as it occurs.

    Args:
        answer: to be checked.
        truths: the right answers.
        empty_is_correct: whether an empty answer to a question without one gets 1, as in SQuAD 2; else 0.

    >>> squad_f1("The Eiffel Tower, Paris", ["Eiffel tower"])
    0.8
    """
    return max((_f1(answer, truth, empty_is_correct) for truth in truths), default=0.0)


def _f1(answer: str, truth: str, empty_is_correct: bool) -> float:
    got, wanted = (squad_normalise(text).split() for text in (answer, truth))
    if not got and not wanted:
        return float(empty_is_correct)
    shared = sum((Counter(got) & Counter(wanted)).values())
    return 2 * shared / (len(got) + len(wanted))


def gsm8k_truth(text: str) -> str:
    """The number that an answer of GSM8K states behind its last `####`, or the text itself without one."""
    return plain_number(text.rpartition("####")[2])


def gsm8k_strict(text: str) -> str | None:
    """The number behind the first `#### ` of a generated answer; None without one."""
    found = _STRICT.search(text)
    return None if found is None else plain_number(found.group(1))


def gsm8k_flexible(text: str) -> str | None:
    """The last number of a generated answer, whatever stands around it; None without one.

    Both patterns are those of the harness's task (`lm_eval/tasks/gsm8k/gsm8k.yaml`).

    >>> gsm8k_flexible("So that is 1,234 dollars.")
    '1234'
    """
    found = _FLEXIBLE.findall(text)
    return plain_number(found[-1]) if found else None


def plain_number(text: str) -> str:
    """A number without commas, dollar signs, surrounding space and a last full stop, in lower case."""
    return text.replace(",", "").replace("$", "").strip().removesuffix(".").lower()


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that at least one of k samples is right, estimated without bias from more of them.

    1 − C(n−c, k) / C(n, k), of Chen et al. (2021, arXiv 2107.03374). Nothing is executed here: who runs the samples
    counts them.

    Args:
        samples: n, how many were drawn for a problem.
        correct: c, how many of them were right.
        k: of how many.

    Raises:
        ValueError: there are fewer samples than k, or more right ones than samples.

    >>> pass_at_k(5, 2, 2)
    0.7
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to the {samples} samples, got {k}")
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must be from 0 to the {samples} samples, got {correct}")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
