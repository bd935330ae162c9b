"""The report's numbers, each against a count made another way."""

from __future__ import annotations

import numpy as np
import pytest

from mora_jax.data import Conversation, EncodedDataset, Message, Report, Segment


def row(question, answer, weight=1.0):
    return Conversation((Message("user", question), Message("assistant", answer)), weight=weight)


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("byte_level", "chatml")


ROWS = [
    row("a b c", "yes"),
    row("a b c", "no, not at all"),
    row("What is 12 + 30?", "It is 42. " * 30),
    row("x", "y"),
    row("a b c", "maybe"),
]


def test_repeated_instructions_are_those_with_the_same_tokens(tokenizer):
    report = EncodedDataset.build(ROWS, tokenizer).report
    assert report.duplicated == 2
    assert report.duplicated_share == pytest.approx(2 / 5)
    assert EncodedDataset.build([row("", "a"), row("", "b")], tokenizer).report.duplicated == 0


def test_what_max_length_costs(tokenizer):
    whole = EncodedDataset.build(ROWS, tokenizer, max_length=1024).report
    assert (whole.over_length, whole.lost_share) == (0, 0.0)
    report = EncodedDataset.build(ROWS, tokenizer, max_length=64).report
    assert report.over_length == 1
    assert report.over_length_share == pytest.approx(1 / 5)
    assert report.trained_before == whole.trained_tokens
    assert report.lost_share == pytest.approx(1 - report.trained_tokens / whole.trained_tokens)
    assert report.lost_share > 0.5
    dropped = EncodedDataset.build(ROWS, tokenizer, max_length=64, truncation="drop").report
    assert dropped.lost_share > report.lost_share
    assert EncodedDataset.build(ROWS, tokenizer, max_length=64, truncation="split").report.lost_share == 0.0


def test_ratio_of_sums_and_of_the_median_row(tokenizer):
    dataset = EncodedDataset.build(ROWS, tokenizer, max_length=1024)
    asked = [np.count_nonzero(example.segments == Segment.USER) for example in dataset]
    said = [np.count_nonzero(example.segments == Segment.ASSISTANT) for example in dataset]
    assert dataset.report.ratio == pytest.approx(sum(asked) / sum(said))
    ratios = [a / s for a, s in zip(asked, said, strict=True)]
    assert dataset.report.median_ratio == pytest.approx(np.median(ratios))
    assert Report().ratio is None and Report().median_ratio is None


def test_near_empty_answers(tokenizer):
    assert EncodedDataset.build([row("a", "y"), row("a", "The answer is yes.")], tokenizer).report.near_empty == 1


def test_tokens_and_weights_by_segment(tokenizer):
    dataset = EncodedDataset.build(ROWS, tokenizer, mode="weighted", prompt_weight=0.25, max_length=1024)
    for segment in Segment:
        tokens = sum(np.count_nonzero(example.segments == segment) for example in dataset)
        weight = sum(float(example.weights[example.segments == segment].sum()) for example in dataset)
        assert dataset.report.by_segment[segment] == tokens
        assert dataset.report.weight_by_segment[segment] == pytest.approx(weight)


@pytest.mark.parametrize("bins", [1, 4, 16])
@pytest.mark.parametrize("lengths", [[5], [7] * 300, list(range(3, 900)), [10] * 990 + [100_000] * 5, [1, 2, 3]])
def test_histogram_counts_every_row_once(lengths, bins):
    report = Report(lengths=np.array(lengths, np.int32))
    starts, rows = report.histogram(bins)
    assert rows.sum() == len(lengths)
    assert 1 <= len(starts) == len(rows) <= bins
    width = np.diff(starts)
    assert (width == width[:1]).all()
    edges = [*starts.tolist(), np.inf]
    expected = [sum(low <= n < high for n in lengths) for low, high in zip(edges, edges[1:], strict=False)]
    assert rows.tolist() == expected


def test_recommended_max_length_holds_99_of_100_rows():
    lengths = np.arange(1, 1001, dtype=np.int32)
    recommended = Report(lengths=lengths).recommended_max_length
    assert recommended == 1024
    assert Report(lengths=np.array([3], np.int32)).recommended_max_length == 64


def test_the_text_says_it_all(tokenizer):
    text = str(EncodedDataset.build(ROWS, tokenizer, max_length=64).report)
    for words in ("5 read, 5 examples kept", "2 rows ask", "of the rows are longer", "in the median row", "near-empty"):
        assert words in text
