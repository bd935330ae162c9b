"""Checks of generated answers: exact match and F1 as in SQuAD, numbers as in GSM8K, pass@k, BLEU and ROUGE.

BLEU and ROUGE are those of sacrebleu and rouge-score: the extra `overlap`.
"""

import functools
import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mora_jax.errors import InputError
from mora_jax.evaluation.metrics.estimate import OfSums

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
    match = _STRICT.search(text)
    return None if match is None else plain_number(match.group(1))


def gsm8k_flexible(text: str) -> str | None:
    """The last number of a generated answer, whatever stands around it; None without one.

    Both patterns are those of the harness's task (`lm_eval/tasks/gsm8k/gsm8k.yaml`).

    >>> gsm8k_flexible("So that is 1,234 dollars.")
    '1234'
    """
    numbers = _FLEXIBLE.findall(text)
    return plain_number(numbers[-1]) if numbers else None


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


ROUGE = ("rouge1", "rouge2", "rougeL")
_ORDERS = 4


def bleu_statistics(answer: str, truths: Sequence[str]) -> list[float]:
    """What an example adds to BLEU: matching n-grams and all n-grams of orders 1 to 4, the two lengths.

    Raises:
        InputError: sacrebleu is not installed.
    """
    score = _bleu().sentence_score(answer, list(truths))
    return [*map(float, score.counts), *map(float, score.totals), float(score.sys_len), float(score.ref_len)]


def bleu_of_sums(sums: np.ndarray) -> float:
    """BLEU, from 0 to 100, of such numbers added over all examples; smoothed as sacrebleu does by default."""
    *counts, answer_length, truth_length = (int(number) for number in sums)
    lengths = {"sys_len": answer_length, "ref_len": truth_length}
    score = _bleu().compute_bleu(counts[:_ORDERS], counts[_ORDERS:], **lengths, smooth_method="exp")
    return float(score.score)


#: Of records with `bleu_statistics`.
BLEU = OfSums("bleu", lambda record: record["bleu_statistics"], bleu_of_sums)


def rouge(answer: str, truths: Sequence[str]) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, from 0 to 1, each the best over the right answers.

    Raises:
        InputError: rouge-score is not installed.
    """
    scores = [_rouge().score(truth, answer) for truth in truths]
    return {name: max(float(one[name].fmeasure) for one in scores) for name in ROUGE}


@functools.cache
def _bleu() -> Any:
    # How many orders count matters to single sentences, which are only counted here; without it there is a warning.
    return _import("sacrebleu.metrics", "sacrebleu", "bleu").BLEU(effective_order=True)


@functools.cache
def _rouge() -> Any:
    return _import("rouge_score.rouge_scorer", "rouge-score", "rouge").RougeScorer(list(ROUGE), use_stemmer=False)


def _import(module: str, package: str, metric: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{metric} needs {package} ({error}); pip install 'mora-jax[overlap]'") from None
