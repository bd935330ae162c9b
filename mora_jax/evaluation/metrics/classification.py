"""Accuracy, F1 and confusion matrix over a fixed list of labels."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

from mora_jax.evaluation.metrics.estimate import OfSums, Record

KINDS = ("macro_f1", "micro_f1", "weighted_f1")


def confusion_matrix(
    truths: Sequence[Hashable], predictions: Sequence[Hashable], labels: Sequence[Hashable]
) -> np.ndarray:
    """How often which label was predicted for which.

    Args:
        truths: the right labels, each one of `labels`.
        predictions: what was predicted; what is none of `labels` is wrong, and counted in the last column.
        labels: all there are, in the order of rows and columns.

    Returns:
        int `[K, K + 1]`: row i the examples of label i, column j those predicted as label j, the last one as none.

    Raises:
        ValueError: a truth is none of the labels.
    """
    place = {label: number for number, label in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels) + 1), int)
    for truth, prediction in zip(truths, predictions, strict=True):
        if truth not in place:
            raise ValueError(f"{truth!r} is none of the labels {', '.join(map(str, labels))}")
        matrix[place[truth], place.get(prediction, len(labels))] += 1
    return matrix


def f1_scores(matrix: np.ndarray) -> np.ndarray:
    """F1 of each label, 2 TP / (2 TP + FP + FN), of a confusion matrix `[K, K + 1]`; 0 where nothing is counted."""
    square = matrix[:, :-1]
    right = np.diag(square)
    counted = matrix.sum(axis=1) + square.sum(axis=0)
    return np.divide(2 * right, counted, out=np.zeros(len(square)), where=counted > 0)


def f1(matrix: np.ndarray, kind: str) -> float:
    """One F1 of a confusion matrix `[K, K + 1]`.

    Args:
        matrix: see `confusion_matrix`.
        kind: `macro_f1` is the mean over all labels, `micro_f1` pools their counts, `weighted_f1` weighs labels by how
            many examples they have.
    """
    if kind == "micro_f1":
        square = matrix[:, :-1]
        counted = matrix.sum() + square.sum()
        return float(2 * np.trace(square) / counted) if counted else 0.0
    weights = matrix.sum(axis=1) if kind == "weighted_f1" else np.ones(len(matrix))
    return float(f1_scores(matrix) @ weights / weights.sum()) if weights.sum() else 0.0


def _f1_metric(kind: str) -> OfSums:
    def statistics(record: Record) -> list[float]:
        labels = range(len(record["choices"]))
        return confusion_matrix([record["answer"]], [record["prediction"]], labels).ravel().tolist()

    def value(sums: np.ndarray) -> float:
        labels = (math.isqrt(4 * len(sums) + 1) - 1) // 2  # of which there are labels * (labels + 1) sums
        return f1(sums.reshape(labels, labels + 1), kind)

    return OfSums(kind, statistics, value)


#: Over records with `choices`, the same in all, and the numbers `answer` and `prediction` (None for none of them).
F1 = tuple(map(_f1_metric, KINDS))
