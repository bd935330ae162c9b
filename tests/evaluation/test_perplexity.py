"""Scores of a data set against a plain loop over its tokens."""

import dataclasses

import numpy as np
import pytest

from mora_jax.data import Conversation, EncodedDataset, Message, Passage
from mora_jax.data.conversation import TokenRow
from mora_jax.data.segments import INSTRUCTION
from mora_jax.errors import InputError
from mora_jax.evaluation.perplexity import DatasetScores, batches, score


def conversations():
    words = ["hi", "a longer instruction, " * 4, "naïve?", "x" * 70, "one more"]
    return [
        Conversation((Message("user", text), Message("assistant", text[::-1][: 9 * place + 3])), source=str(place))
        for place, text in enumerate(words)
    ]


def plain_loop(model, dataset):
    nll = weight = correct = tokens = prompt_nll = prompt_tokens = 0.0
    for example in dataset:
        logits = np.asarray(model(example.input_ids[None]), np.float64)[0]
        log_z = np.log(np.exp(logits).sum(-1))
        for place in range(1, len(example)):
            if example.weights[place] > 0:
                token = example.input_ids[place]
                nll += float(example.weights[place]) * (log_z[place - 1] - logits[place - 1, token])
                weight += float(example.weights[place])
                correct += logits[place - 1].argmax() == token
                tokens += 1
            if example.segments[place] in INSTRUCTION:
                prompt_nll += log_z[place - 1] - logits[place - 1, example.input_ids[place]]
                prompt_tokens += 1
    return nll / weight, correct / tokens, tokens, weight, prompt_nll / prompt_tokens, prompt_tokens


@pytest.mark.parametrize("mode, prompt_weight", [("masked", 0.0), ("weighted", 0.3), ("full", 0.0)])
def test_scores_equal_a_plain_loop(model, tokenizer, mode, prompt_weight):
    dataset = EncodedDataset.build(conversations(), tokenizer, None, mode, prompt_weight, 128)
    expected = plain_loop(model, dataset)
    for batch_size in (2, 5):
        scores = score(model, dataset, batch_size=batch_size)
        found = (scores.nll, scores.accuracy, scores.tokens, scores.weight, scores.prompt_nll, scores.prompt_tokens)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert 0 < scores.prompt_tokens != scores.tokens
    alone = [plain_loop(model, [example]) for example in dataset]
    assert scores.example_nll == pytest.approx(np.mean([one[0] for one in alone]), rel=1e-5)
    for stderr, value, column in ((scores.nll_stderr, 0, 3), (scores.accuracy_stderr, 1, 2)):
        weights = np.array([one[column] for one in alone])
        rest = np.array([one[value] for one in alone]) * weights - expected[value] * weights
        assert stderr == pytest.approx(np.sqrt(5 / 4 * np.sum(rest**2)) / weights.sum(), rel=1e-4)
    assert scores.to_dict()["perplexity"] == pytest.approx(np.exp(expected[0]), rel=1e-5)


def token_rows(*weights):
    return [TokenRow(tuple(range(1, 5)), (0.0, *row), source=f"f.jsonl, row {n}") for n, row in enumerate(weights, 1)]


def test_the_mean_over_examples_takes_the_weights_of_rows(model, tokenizer):
    rows = [TokenRow((1, 2, 3), (0.0, 1.0, 2.0), weight=3.0), TokenRow((4, 5, 6, 7), (0.0, 1.0, 0.0, 1.0), weight=0.5)]
    alone = [score(model, EncodedDataset.build([row], tokenizer)).nll for row in rows]
    found = score(model, EncodedDataset.build(rows, tokenizer)).example_nll
    assert found == pytest.approx((3 * alone[0] + 0.5 * alone[1]) / 3.5, rel=1e-5)


def test_weights_beyond_float32_are_refused_and_large_ones_are_not(model, tokenizer):
    dataset = EncodedDataset.build(token_rows([1, 2, 3], [3e38, 3e38, 0]), tokenizer)
    with pytest.raises(InputError, match=r"f.jsonl, row 2: the weights .* more than float32 holds"):
        score(model, dataset)
    small, large = (EncodedDataset.build(token_rows([x, 2 * x, 3 * x]), tokenizer) for x in (1, 1e35))
    assert score(model, large).nll == pytest.approx(score(model, small).nll, rel=1e-5)


def test_without_instructions_there_is_no_score_of_them(model, tokenizer):
    dataset = EncodedDataset.build([Passage((("some text", True),))], tokenizer, max_length=64)
    scores = score(model, dataset)
    assert scores.prompt_nll is None
    assert scores.prompt_tokens == 0
    assert np.isfinite(scores.nll)


def test_progress_counts_rows(model, tokenizer):
    seen = []
    dataset = EncodedDataset.build(conversations(), tokenizer, max_length=128)
    score(model, dataset, batch_size=2, progress=lambda done, rows: seen.append((done, rows)))
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_batches_hold_every_row_once_in_few_shapes(batch_size):
    lengths = np.random.default_rng(0).integers(2, 300, 50).tolist()
    seen, shapes = [], []
    for rows, length in batches(lengths, batch_size, 300):
        assert 0 < len(rows) <= batch_size
        assert max(lengths[row] for row in rows) <= length
        seen += rows.tolist()
        shapes.append(length)
    assert sorted(seen) == list(range(50))
    assert set(shapes) <= {64, 128, 256, 300}


def test_perplexity_stays_finite():
    assert np.isfinite(DatasetScores(nll=1e6, accuracy=0.0, tokens=1, weight=1.0).perplexity)
    scores = DatasetScores(nll=1.0, accuracy=0.5, tokens=1000, weight=1.0)
    assert "perplexity 2.7183, nll 1.0000 nats a token, accuracy 50.00% on" in str(scores)
    errors = dataclasses.replace(scores, nll_stderr=0.25, accuracy_stderr=0.1)
    assert "nll 1.0000 ± 0.2500 nats a token, accuracy 50.00% ± 10.00% on" in str(errors)
    assert "instructions" not in str(scores)
    assert "instructions: nll 2.0000 on 3 tokens" in str(dataclasses.replace(scores, prompt_nll=2.0, prompt_tokens=3))
