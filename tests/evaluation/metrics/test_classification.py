"""F1 and confusion matrices against loops."""

import numpy as np
import pytest

from mora_jax.evaluation.metrics.classification import F1, KINDS, confusion_matrix, f1, f1_scores

GOLD, PREDICTED = [0, 0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1, 2, 0]


def by_loops(gold, predicted, labels):
    """F1 of each label, their mean, pooled, and weighed by support."""
    counts = {}
    for label in labels:
        pairs = list(zip(gold, predicted, strict=True))
        right = sum(g == label == p for g, p in pairs)
        counts[label] = right, sum(p == label != g for g, p in pairs), sum(g == label != p for g, p in pairs)
    scores = [2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0 for tp, fp, fn in counts.values()]
    tp, fp, fn = np.sum(list(counts.values()), axis=0)
    support = [gold.count(label) for label in labels]
    return scores, np.mean(scores), 2 * tp / (2 * tp + fp + fn), np.dot(scores, support) / len(gold)


def test_the_worked_case():
    matrix = confusion_matrix(GOLD, PREDICTED, range(3))
    assert matrix.tolist() == [[3, 2, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(f1_scores(matrix), [2 / 3, 0.4, 0])
    assert [f1(matrix, kind) for kind in KINDS] == pytest.approx([0.355556, 0.5, 0.516667], abs=1e-6)
    assert f1(confusion_matrix(GOLD, PREDICTED, range(4)), "macro_f1") == pytest.approx(0.266667, abs=1e-6)


def test_drawn_labels_some_of_them_unreadable():
    random = np.random.default_rng(0)
    labels = ["no", "yes", "perhaps", "never seen"]
    gold = random.choice(labels[:3], 50).tolist()
    predicted = random.choice(["no", "yes", "perhaps", "?"], 50).tolist()
    matrix = confusion_matrix(gold, predicted, labels)
    scores, *means = by_loops(gold, predicted, labels)
    np.testing.assert_allclose(f1_scores(matrix), scores, atol=1e-12)
    np.testing.assert_allclose([f1(matrix, kind) for kind in KINDS], means, atol=1e-12)
    assert matrix[:, -1].sum() == predicted.count("?")
    records = [
        {"choices": labels, "answer": labels.index(g), "prediction": labels.index(p) if p in labels else None}
        for g, p in zip(gold, predicted, strict=True)
    ]
    assert [metric.name for metric in F1] == list(KINDS)
    assert [metric(records).value for metric in F1] == pytest.approx([f1(matrix, kind) for kind in KINDS], abs=1e-12)
    found = F1[0](records)
    assert found.value == pytest.approx(means[0], abs=1e-12)
    assert 0 < found.stderr < 0.2


def test_a_truth_that_is_no_label():
    with pytest.raises(ValueError, match="'x' is none of the labels a, b"):
        confusion_matrix(["x"], ["a"], ["a", "b"])
