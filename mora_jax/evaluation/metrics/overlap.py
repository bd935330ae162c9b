"""BLEU and ROUGE, by sacrebleu and rouge-score: the extra `overlap`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mora_jax.errors import InputError
from mora_jax.evaluation.metrics.estimate import OfSums

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
    numbers = [int(number) for number in sums]
    return float(
        _bleu()
        .compute_bleu(
            correct=numbers[:_ORDERS],
            total=numbers[_ORDERS : 2 * _ORDERS],
            sys_len=numbers[-2],
            ref_len=numbers[-1],
            smooth_method="exp",
        )
        .score
    )


#: Of records with `bleu_statistics`.
BLEU = OfSums("bleu", lambda record: record["bleu_statistics"], bleu_of_sums)


def rouge(answer: str, truths: Sequence[str]) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, from 0 to 1, each the best over the right answers.

    Raises:
        InputError: rouge-score is not installed.
    """
    found = [_rouge().score(truth, answer) for truth in truths]
    return {name: max(float(one[name].fmeasure) for one in found) for name in ROUGE}


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
