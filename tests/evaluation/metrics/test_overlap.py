"""BLEU and ROUGE: sums over examples give what the libraries give over a corpus."""

import sys

import pytest

from mora_jax.errors import InputError
from mora_jax.evaluation.metrics import answers as overlap

ANSWERS = ["the cat sat on the mat", "hello there general", ""]
TRUTHS = [["the cat is on the mat", "a cat was there"], ["hello there general kenobi", "x"], ["y z", "nothing"]]


@pytest.mark.peers
def test_bleu_is_that_of_the_corpus():
    sacrebleu = pytest.importorskip("sacrebleu")
    records = [{"bleu_statistics": overlap.bleu_statistics(*pair)} for pair in zip(ANSWERS, TRUTHS, strict=True)]
    found = overlap.BLEU(records)
    expected = sacrebleu.corpus_bleu(ANSWERS, [list(column) for column in zip(*TRUTHS, strict=True)]).score
    assert found.value == pytest.approx(expected)
    assert found.stderr > 0


@pytest.mark.peers
def test_rouge_is_the_best_of_the_right_answers():
    pytest.importorskip("rouge_score")
    found = overlap.rouge(ANSWERS[0], TRUTHS[0])
    # 5 of 6 words, 3 of 5 pairs of words, a common subsequence of 5 words.
    assert found == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6})


def test_without_the_libraries_one_line_says_what_to_install(monkeypatch):
    for module in ("sacrebleu.metrics", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, module, None)
    for cached in (overlap._bleu, overlap._rouge):
        cached.cache_clear()
    with pytest.raises(InputError, match=r"bleu needs sacrebleu \(.*\); pip install 'mora-jax\[overlap\]'"):
        overlap.bleu_statistics("a", ["b"])
    with pytest.raises(InputError, match="rouge needs rouge-score"):
        overlap.rouge("a", ["b"])
