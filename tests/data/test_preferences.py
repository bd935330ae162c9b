"""Preferences as tokens and batches: what is counted, what a cut leaves alike, how rows are laid."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mora_jax.data import BatchPlan, EncodedDataset, load_rows, load_tokenizer
from mora_jax.data.conversation import Side
from mora_jax.data.pipeline import BatchSource
from mora_jax.data.preferences import PreferenceDataset, refuse_preferences, split_preferences
from mora_jax.data.sources import Source
from mora_jax.demo import model_path
from mora_jax.errors import InputError

PAIRS = [
    {
        "prompt": f"What is {word} and why is it so, in some words?",
        "chosen": f"It is {word}.",
        "rejected": "No. " * size,
    }
    for word, size in (("red", 2), ("blue", 5), ("green", 9), ("white", 1))
]
LABELS = [{"prompt": f"Say {i}", "completion": "yes " * (i + 1), "label": i % 2 == 0} for i in range(4)]
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Two plus two?"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_path())


def encoded(rows, tokenizer, **settings):
    settings = {"template": "chatml", "max_length": 200} | settings
    return EncodedDataset.build(load_rows(rows), tokenizer, **settings)


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_the_answer_carries_loss_and_nothing_before_it(tokenizer):
    row = {"prompt": TURNS, "chosen": "Four.", "rejected": "Five, I think."}
    examples = encoded([row], tokenizer)
    for example, answer in zip(examples, ("Four.", "Five, I think."), strict=True):
        said = example.input_ids[example.answer_weights > 0]
        assert text(tokenizer, said).startswith(answer)
        assert "Hello" not in text(tokenizer, said)
        # The loss mode, of the SFT term, is as of any conversation: both answers of the assistant.
        assert "Hello" in text(tokenizer, example.input_ids[example.weights > 0])
    assert [example.side for example in examples] == [Side.CHOSEN, Side.REJECTED]


def test_weights_of_messages_count_in_answers(tokenizer):
    answer = [
        {"role": "assistant", "content": "Four."},
        TURNS[0],
        {"role": "assistant", "content": "Bye.", "weight": 0.5},
    ]
    example = encoded([{"prompt": TURNS, "chosen": answer, "rejected": "Five."}], tokenizer)[0]
    assert set(example.answer_weights.tolist()) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("policy", ["right", "left", "prompt_first"])
def test_a_cut_leaves_the_prompt_alike(policy, tokenizer):
    whole = encoded(PAIRS, tokenizer)
    limit = int(np.median(whole.lengths)) - 3
    cut = encoded(PAIRS, tokenizer, max_length=limit, truncation=policy)
    assert len(cut) and len(cut) % 2 == 0 and (cut.lengths <= limit).all()
    assert (cut.lengths < whole.lengths.max()).any()
    by_source = {example.source: example for example in whole}
    for first, second in zip(cut[::2], cut[1::2], strict=True):
        assert (first.side, second.side) == (Side.CHOSEN, Side.REJECTED)
        starts = [int(np.flatnonzero(example.answer_weights)[0]) for example in (first, second)]
        assert starts[0] == starts[1]
        np.testing.assert_array_equal(first.input_ids[: starts[0]], second.input_ids[: starts[1]])
        for example in (first, second):
            before = by_source[example.source]
            kept = len(example.answer_weights.nonzero()[0])
            np.testing.assert_array_equal(
                example.input_ids[starts[0] :],
                before.input_ids[np.flatnonzero(before.answer_weights)[0] :][: len(example) - starts[0]],
            )
            assert kept > 0


def test_left_keeps_answers_whole_where_the_prompt_suffices(tokenizer):
    whole = encoded(PAIRS[:1], tokenizer)
    cut = encoded(PAIRS[:1], tokenizer, max_length=int(whole.lengths.max()) - 5, truncation="left")
    counts = [[np.count_nonzero(example.answer_weights) for example in dataset] for dataset in (whole, cut)]
    assert counts[0] == counts[1]
    assert (whole.lengths - cut.lengths).tolist() == [5, 5]


def test_answers_that_a_template_or_a_cut_makes_equal_are_left_out(tokenizer):
    """The template trims what stands around an answer; the other pair differs in its last word alone."""
    long, trimmed = "as I said, " * 9, PAIRS[0] | {"chosen": "It is red.", "rejected": " It is red. "}
    late = PAIRS[0] | {"chosen": f"{long} red.", "rejected": f"{long} blue."}
    rows = [PAIRS[1], trimmed, late]
    whole = encoded(rows, tokenizer, template="llama3", max_length=400)
    assert (len(whole), whole.report.dropped) == (4, {"tie": 2})
    start = int(np.flatnonzero(whole[2].answer_weights)[0])
    cut = encoded(rows, tokenizer, template="llama3", max_length=start + 8)
    assert (len(cut), cut.report.dropped) == (2, {"tie": 4})
    assert cut.report.trained_tokens == sum(np.count_nonzero(one.answer_weights) for one in cut)
    with pytest.raises(InputError, match="give the rows answers that differ"):
        encoded([trimmed], tokenizer, template="llama3")


def test_the_fingerprint_knows_where_answers_begin(tokenizer):
    turns = [{"role": "assistant", "content": "Four."}, {"role": "user", "content": "Why?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Two twos.", "Because.")]

    def pair(n):
        chosen, rejected = (turns[n:] + answer for answer in answers)
        return encoded([{"prompt": TURNS + turns[:n], "chosen": chosen, "rejected": rejected}], tokenizer)

    later, sooner = pair(2), pair(0)
    assert all((one.input_ids == other.input_ids).all() for one, other in zip(later, sooner, strict=True))
    assert later.fingerprint() != sooner.fingerprint()
    good, bad = (encoded([LABELS[0] | {"label": label}], tokenizer) for label in (True, False))
    assert good.fingerprint() != bad.fingerprint()


def test_pairs_go_together(tokenizer):
    whole = encoded(PAIRS, tokenizer)
    limit = int(whole.lengths[1::2].max()) - 1
    dropped = encoded(PAIRS, tokenizer, max_length=limit, truncation="drop")
    assert len(dropped) == len(whole) - 2 and dropped.report.dropped == {"too_long": 2}
    assert [example.source.split(", ")[1] for example in dropped] == [
        f"row {row}" for row in range(1, 5) for _ in range(2) if row != 3
    ]
    with pytest.raises(InputError, match="nothing trained within max_length"):
        encoded(PAIRS, tokenizer, max_length=8)


def test_a_broken_half_takes_the_other_with_it(tmp_path, tokenizer):
    bad = PAIRS[0] | {"rejected": {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([PAIRS[1], bad, PAIRS[2]]))
    source = Source((str(path),), template="alpaca", on_error="skip", cache="off", workers=1)
    store = source.load(tokenizer)
    assert store.sides.tolist() == [1, 2, 1, 2]
    assert store.facts["counts"]["skipped"] == 1


def test_batches_of_pairs(tokenizer):
    answers = encoded(PAIRS, tokenizer)
    dataset = PreferenceDataset(answers)
    assert len(dataset) == 4 and dataset.lengths.tolist() == answers.lengths.reshape(-1, 2).max(axis=1).tolist()
    batch = dataset.batch([np.array([2]), np.array([0])], 3)
    assert batch["input_ids"].shape == (3, 2, dataset.batch_length)
    for half in range(2):
        example = answers[2 * 2 + half]
        np.testing.assert_array_equal(batch["input_ids"][0, half, : len(example)], example.input_ids)
        np.testing.assert_array_equal(batch["answer_weights"][0, half, : len(example)], example.answer_weights)
        assert batch["segment_ids"][0, half].sum() == len(example)
    assert batch["example_weights"].tolist() == [[1.0], [1.0], [0.0]] and batch["desired"][0, 0] == 1
    # The SFT term is of chosen answers.
    assert batch["weights"][0, 0].any() and not batch["weights"][:, 1].any()
    assert batch["counts"].tolist() == batch["weights"].sum(axis=(1, 2)).tolist()


def test_packs_hold_several_pairs(tokenizer):
    answers = encoded(PAIRS, tokenizer)
    dataset = PreferenceDataset(answers, packing=True)
    plan = BatchPlan(dataset.lengths, 1, steps=4, max_length=dataset.max_length, packing=True)
    batch = BatchSource(dataset, plan, 1)[0]
    members = plan.rows(0)[0]
    assert len(members) > 1 and batch["example_weights"].shape == (1, 1, dataset.sequences)
    assert batch["example_weights"].sum() == len(members)
    for half in range(2):
        segments = batch["segment_ids"][0, 0, half]
        for number, index in enumerate(members, start=1):
            example = answers[2 * int(index) + half]
            np.testing.assert_array_equal(batch["input_ids"][0, 0, half][segments == number], example.input_ids)
            assert batch["positions"][0, 0, half][segments == number].tolist() == list(range(len(example)))


def test_labelled_answers_stand_beside_another_ones(tokenizer):
    answers = encoded(LABELS, tokenizer)
    dataset = PreferenceDataset(answers, labelled=True)
    assert len(dataset) == 4
    batch = dataset.batch([np.array([1])])
    first, crossed = answers[1], batch["input_ids"][0, 1][batch["segment_ids"][0, 1] > 0]
    assert batch["desired"].tolist() == [[0.0]]
    assert "Say 1" in text(tokenizer, crossed) and text(tokenizer, crossed).count("yes") == 4
    np.testing.assert_array_equal(batch["input_ids"][0, 0][: len(first)], first.input_ids)
    pairs = PreferenceDataset(encoded(PAIRS, tokenizer), labelled=True)
    assert len(pairs) == 8 and pairs.batch([[0], [1]])["desired"].tolist() == [[1.0], [0.0]]


def test_a_split_keeps_pairs_together(tokenizer):
    store = encoded(PAIRS, tokenizer).store
    train, held_out = split_preferences(store, 0.5, seed=1)
    assert sorted([*train, *held_out]) == list(range(8))
    for rows in (train, held_out):
        assert store.sides[rows].tolist() == [1, 2] * (len(rows) // 2)
        assert (rows[1::2] == rows[::2] + 1).all()


def test_rows_of_another_kind_are_refused(tokenizer):
    plain = encoded([{"prompt": "Hi", "completion": "Hello"}] * 2, tokenizer)
    with pytest.raises(InputError, match=r"rows of `chosen` and `rejected`, and these were read as prompt_com"):
        PreferenceDataset(plain)
    with pytest.raises(InputError, match="rows of `chosen` and `rejected`"):
        PreferenceDataset(encoded(LABELS, tokenizer))
    with pytest.raises(InputError, match="set loss.objective=dpo"):
        refuse_preferences(encoded(PAIRS, tokenizer).store)
    refuse_preferences(plain.store)
