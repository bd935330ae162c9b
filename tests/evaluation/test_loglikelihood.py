"""Log-likelihoods of texts against a plain loop over their tokens."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from mora_jax.errors import InputError
from mora_jax.evaluation import loglikelihood
from mora_jax.evaluation.loglikelihood import LoglikelihoodScorer, windows
from mora_jax.training.build_step import put_model
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import Placement
from tests.evaluation import tiny

PAIRS = [
    ("A question", " answer"),
    ("A question", " other"),
    ("A question: A, B or C?", "A"),
    ("A question: A, B or C?", "B"),
    ("A question: A, B or C?", "C"),
    ("", "no context"),
    ("trailing space ", "x"),
    ("a longer one, " * 6, " and its é ending"),
    ("w" * 140, " beyond"),  # loses its beginning
]


def plain_loop(model, context, continuation, longest=128):
    """The sum, how many tokens are the likeliest, and how many there are."""
    tokens = [*context, *continuation][-longest - 1 :]
    total, correct = 0.0, 0
    for place in range(len(tokens) - len(continuation), len(tokens)):
        row, token = next_logits(model, tokens[:place]), tokens[place]
        total += row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
        correct += int(row.argmax()) == token
    return total, correct, len(continuation)


def next_logits(model, tokens):
    """Of the token after the last, float64 `[V]`."""
    padded = np.zeros((1, 128), np.int32)  # one shape for all; what is behind a token doesn't matter to it
    padded[0, : len(tokens)] = tokens
    return np.asarray(model(padded), np.float64)[0, len(tokens) - 1]


def ids(text):
    """Of the tiny tokenizer: byte-level letters in alphabetical order; ASCII alone."""
    letters = sorted(tiny.pre_tokenizers.ByteLevel.alphabet())
    return [letters.index("Ġ" if letter == " " else letter) for letter in text]


def test_one_compilation_a_bucket_and_one_row_for_choices_of_one_token(model, tokenizer, monkeypatch):
    seen = []
    whole = loglikelihood._batch

    def batch(rows, size, length):
        seen.append((len(rows), length))
        return whole(rows, size, length)

    monkeypatch.setattr(loglikelihood, "_batch", batch)
    loglikelihood._score.clear_cache()
    scorer = LoglikelihoodScorer(model, tokenizer, batch_size=4)
    counted = []
    scorer.loglikelihood(PAIRS, lambda *counts: counted.append(counts))
    assert counted == sorted(counted) and counted[-1] == (len(PAIRS), len(PAIRS))
    assert loglikelihood._score._cache_size() == len({length for _, length in seen}) == 2
    assert sum(count for count, _ in seen) == len(PAIRS) - 2
    LoglikelihoodScorer(model, tokenizer, batch_size=4).loglikelihood(PAIRS[::-1])
    assert loglikelihood._score._cache_size() == 2


@pytest.mark.parametrize("batch_size", [1, 4])
def test_sums_equal_a_plain_loop_whatever_the_batch_size(model, tokenizer, batch_size):
    found = LoglikelihoodScorer(model, tokenizer, batch_size=batch_size).loglikelihood(PAIRS)
    for (context, continuation), score in zip(PAIRS, found, strict=True):
        before = tokenizer(context.rstrip())["input_ids"] if context else [256]
        behind = tokenizer(context[len(context.rstrip()) :] + continuation)["input_ids"]
        total, correct, tokens = plain_loop(model, before, behind)
        assert score.logprob == pytest.approx(total, abs=1e-5 * max(1, abs(total)))
        assert (score.correct, score.tokens, score.is_greedy) == (correct, tokens, correct == tokens)


def test_the_likeliest_continuation_is_greedy(model, tokenizer):
    context = ids("Say it")
    likeliest = []
    for _ in range(3):
        likeliest.append(int(next_logits(model, context + likeliest).argmax()))
    scorer = LoglikelihoodScorer(model, tokenizer, batch_size=4)
    other = [*likeliest[:2], (likeliest[2] + 1) % 261]
    right, wrong = scorer.score([(context, likeliest), (context, other)])
    assert (right.is_greedy, right.correct, wrong.is_greedy, wrong.correct) == (True, 3, False, 2)


def test_more_scored_tokens_than_the_input_has(model, tokenizer):
    context = ids("ab")
    found = LoglikelihoodScorer(model, tokenizer).score([(context, [token]) for token in range(200)])
    logits = next_logits(model, context)
    expected = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose([score.logprob for score in found], expected[:200], atol=1e-5)


def test_context_and_continuation_are_encoded_together(model):
    """Tokens 1 a, 2 b, 3 ab, 4 space-b, 5 BOS; the tokenizer merges across the border."""
    table = {"a": [1], "ab": [3], "a b": [1, 4], "b": [2], "a<s>": [1, 5], "<s>a": [5, 1], "<s>ab": [5, 3], "": []}

    def tokenizer(texts, add_special_tokens=True, **_):
        if isinstance(texts, str):
            return {"input_ids": [5] * (add_special_tokens and bos) + table[texts]}
        return {"input_ids": [list(table[text]) for text in texts]}

    def scorer(**changes):
        kind = {"__call__": staticmethod(tokenizer)}
        given = SimpleNamespace(**{"bos_token_id": None, "eos_token_id": 0, **changes})
        return LoglikelihoodScorer(model, type("Toy", (), {**kind, **vars(given)})())

    bos = False
    plain = scorer()
    assert plain.encode_pairs([("a ", "b"), ("a", " b"), ("a", "b"), ("", "b"), (" ", "b")][:4]) == [
        ([1], [4]),
        ([1], [4]),
        ([1], []),  # `ab` is one token, which counts as the context's
        ([0], [2]),
    ]
    with pytest.raises(InputError, match="request 1: the continuation has no tokens"):
        plain.loglikelihood([("a", " b"), ("a", "b")])
    bos = True
    adding = scorer(bos_token_id=5)
    assert adding.encode_pairs([("a", " b"), ("<s>a", "b"), ("", "b"), ("", "<s>a")]) == [
        ([5, 1], [4]),
        ([5, 1], []),
        ([5], [2]),
        ([5], [1]),
    ]
    assert adding.encode(["a", "<s>a"], plain=True) == [[1], [5, 1]]


@pytest.mark.parametrize(
    "context, expected",
    [
        (1, [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]),
        (3, [([-1], [0, 1, 2, 3]), ([1, 2, 3], [4, 5]), ([3, 4, 5], [6, 7]), ([5, 6, 7], [8, 9])]),
    ],
)
def test_windows(context, expected):
    assert windows(range(10), -1, 4, context) == expected
    assert windows(range(4), -1, 4, context) == [([-1], [0, 1, 2, 3])]
    assert windows([], -1, 4, context) == []


def test_windows_need_a_context_that_fits():
    with pytest.raises(ValueError, match="from 1 to the length 4"):
        windows(range(10), -1, 4, 5)


def test_rolling_scores_every_token_once(model, tokenizer):
    texts = ["short", "", "a longer text, " * 4]
    scorer = LoglikelihoodScorer(model, tokenizer, batch_size=4, max_length=16)
    for context in (1, 9):
        found = scorer.loglikelihood_rolling(texts, context=context)
        for text, score in zip(texts, found, strict=True):
            parts = [plain_loop(model, *window, 16) for window in windows(ids(text), 256, 16, context)]
            total, correct, tokens = np.sum(parts, axis=0) if parts else (0, 0, 0)
            assert score.logprob == pytest.approx(total, abs=1e-4)
            assert (score.correct, score.tokens) == (correct, tokens) == (correct, len(text))


def test_what_cannot_be_scored_is_refused(model, tokenizer):
    scorer = LoglikelihoodScorer(model, tokenizer, max_length=8)
    assert scorer.loglikelihood([]) == []
    assert scorer.loglikelihood_rolling([]) == []
    with pytest.raises(InputError, match="request 0: the continuation has 9 tokens, an input at most 8"):
        scorer.loglikelihood([("a", "b" * 9)])
    with pytest.raises(InputError, match="request 1: the context has no tokens"):
        scorer.score([([1], [2]), ([], [2])])
    for requests in ([([1], [261])], [([261], [1])]):
        with pytest.raises(InputError, match="261"):
            scorer.score(requests)
    for changes in ({"batch_size": 0}, {"max_length": 0}, {"max_length": 129}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            LoglikelihoodScorer(model, tokenizer, **changes)


def test_a_mesh_gives_the_same_scores(model, tokenizer):
    pairs = PAIRS[:7]  # of one bucket
    alone = LoglikelihoodScorer(model, tokenizer, batch_size=4).loglikelihood(pairs)
    other = nnx.merge(*nnx.split(model))
    placement = Placement.of(make_mesh(2, 1, 2, devices=jax.devices()[:4]), nnx.state(other))
    put_model(placement, other)
    scorer = LoglikelihoodScorer(other, tokenizer, batch_size=4, partitioner=placement.partitioner)
    found = scorer.loglikelihood(pairs)
    np.testing.assert_allclose([one.logprob for one in found], [one.logprob for one in alone], rtol=1e-5)
    assert [one[1:] for one in found] == [one[1:] for one in alone]
