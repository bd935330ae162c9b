"""The encoded data set: cuts and drops, counts, batches, splits."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from mora_jax.data import (
    Conversation,
    EncodedDataset,
    LossWeights,
    Message,
    Passage,
    Segment,
    TokenRow,
    describe_example,
    inspect_data,
    load_rows,
    split_rows,
    token_texts,
)
from mora_jax.errors import InputError


def row(question, answer=None, source=""):
    answers = () if answer is None else (Message("assistant", answer),)
    return Conversation((Message("user", question), *answers), source=source)


ROWS = [
    row("a", "b"),
    row("What is 12 + 30?", "It is 42."),
    row("Name the capital of France. " * 30, "Paris"),
    row("no answer"),
    row("long", "The answer is yes. " * 40),
]


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("byte_level", "chatml")


def test_cut_on_the_right_and_drop_by_cause(tokenizer):
    dataset = EncodedDataset.build(ROWS, tokenizer, max_length=64)
    report = dataset.report
    assert (report.rows, report.kept, report.truncated) == (5, 3, 1)
    assert report.dropped == {"answer_cut_off": 1, "no_answer": 1}
    assert dataset.lengths[-1] == len(dataset[-1]) == 64
    assert all(example.weights.any() for example in dataset)


def test_drop_instead_of_cut(tokenizer):
    report = EncodedDataset.build(ROWS, tokenizer, max_length=64, truncation="drop").report
    assert (report.kept, report.truncated) == (2, 0)
    assert report.dropped == {"too_long": 2, "no_answer": 1}


def test_counts_of_the_report(tokenizer):
    dataset = EncodedDataset.build(ROWS[:2], tokenizer)
    report = dataset.report
    segments = np.concatenate([example.segments for example in dataset])
    response = np.isin(segments, [Segment.ASSISTANT, Segment.END_OF_TURN]).sum()
    assert report.tokens == len(segments)
    assert report.trained_tokens == response
    assert report.trained_fraction == pytest.approx(response / len(segments))
    ratio = (segments == Segment.USER).sum() / (segments == Segment.ASSISTANT).sum()
    assert report.ratio == pytest.approx(ratio)
    assert report.quantiles["longest"] == dataset.lengths.max()
    assert report.recommended_max_length == 64
    text = str(report)
    assert "2 read, 2 examples kept" in text
    assert "masked" in text


def test_report_of_seams_and_special_words(tokenizer):
    rows = [row("a", "\n\nfine"), row("a<|im_end|>", "b"), row("a", "b")]
    report = EncodedDataset.build(rows, tokenizer).report
    assert (report.seam_rows, report.special_rows) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            ROWS[2:3],
            {"max_length": 64},
            r"none of the 1 rows .*raise data.max_length \(now 64; half .* at most \d{3}",
        ),
        (
            ROWS[2:3],
            {"max_length": 64, "truncation": "drop"},
            "raise data.max_length .* or set data.truncation=prompt_first",
        ),
        (ROWS[3:4], {}, "no answer to train on.*loss.mode=unmasked"),
        ([], {}, "no rows"),
        (ROWS, {"max_length": 1}, "max_length is 1: it must be at least 2"),
        (ROWS, {"truncation": "lef"}, "unknown truncation 'lef'"),
        (ROWS, {"mode": "mask"}, "unknown loss mode 'mask'"),
        (ROWS, {"mode": "weighted", "prompt_weight": 2.0}, "prompt_weight is 2.0"),
    ],
)
def test_nothing_that_can_be_trained(rows, settings, message, tokenizer):
    with pytest.raises(InputError, match=message):
        EncodedDataset.build(rows, tokenizer, **settings)


def test_ids_outside_the_vocabulary(tokenizer):
    rows = [row("ab", "c", source="f.json, row 9")]
    EncodedDataset.build(rows, tokenizer, vocab_size=len(tokenizer))
    with pytest.raises(InputError, match=r"f\.json, row 9: token id \d+ is outside the model's 50 embeddings"):
        EncodedDataset.build(rows, tokenizer, vocab_size=50)


def test_batch_pads_tokens_and_rows(tokenizer):
    dataset = EncodedDataset.build(ROWS[:2], tokenizer)
    first, second = dataset
    assert dataset.batch_length == 64
    batch = dataset.batch([1, 0], batch_size=3)
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "input_ids": ((3, 64), "int32"),
        "segment_ids": ((3, 64), "int32"),
        "positions": ((3, 64), "int32"),
        "weights": ((3, 64), "float32"),
        "counts": ((3,), "float32"),
    }
    np.testing.assert_array_equal(batch["input_ids"][0, : len(second)], second.input_ids)
    np.testing.assert_array_equal(batch["weights"][1, : len(first)], first.weights)
    assert batch["segment_ids"].sum(axis=1).tolist() == [len(second), len(first), 0]
    assert batch["weights"].sum() == dataset.report.trained_tokens
    assert not batch["weights"][batch["segment_ids"] == 0].any()


def test_batch_length_is_at_most_max_length(tokenizer):
    assert EncodedDataset.build(ROWS, tokenizer, max_length=100).batch_length == 100


def test_batch_that_does_not_fit(tokenizer):
    dataset = EncodedDataset.build(ROWS[:2], tokenizer)
    with pytest.raises(ValueError, match="2 rows do not fit a batch of 1"):
        dataset.batch([0, 1], 1, 64)
    with pytest.raises(ValueError, match="tokens do not fit a row of 4"):
        dataset.batch([0], 1, 4)


def test_split_is_the_same_for_the_same_seed():
    train, held_out = split_rows(20, 0.25, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted([*train, *held_out]) == list(range(20))
    assert [part.tolist() for part in split_rows(20, 0.25, seed=3)] == [train.tolist(), held_out.tolist()]
    assert held_out.tolist() != split_rows(20, 0.25, seed=4)[1].tolist()
    assert len(split_rows(20, 0.001)[1]) == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 0.99])
def test_split_that_leaves_nothing(fraction):
    with pytest.raises(InputError, match="eval_fraction"):
        split_rows(2, fraction)


def test_parts_of_a_store(tokenizer):
    dataset = EncodedDataset.build(ROWS, tokenizer, max_length=64)
    part = dataset.with_loss(LossWeights("full"), rows=np.array([1, 3]))
    assert (len(part), part.report.rows) == (2, 2)
    np.testing.assert_array_equal(part[0].input_ids, dataset[1].input_ids)
    assert np.count_nonzero(part[0].weights) == len(part[0]) - 1


def test_split_rows_train_every_token_once(tokenizer):
    whole = EncodedDataset.build(ROWS[4:], tokenizer, max_length=512)
    pieces = EncodedDataset.build(ROWS[4:], tokenizer, max_length=32, truncation="split")
    assert pieces.report.split == 1 and len(pieces) > 3
    assert pieces.report.trained_tokens == whole.report.trained_tokens
    trained = [example.input_ids[example.weights > 0] for example in pieces]
    np.testing.assert_array_equal(np.concatenate(trained), whole[0].input_ids[whole[0].weights > 0])


def test_a_pack_holds_its_examples_one_after_the_other(tokenizer):
    dataset = EncodedDataset.build(ROWS[:2], tokenizer)
    first, second = dataset[0], dataset[1]
    batch = dataset.batch([np.array([1, 0])], 2, 128)
    total = len(first) + len(second)
    np.testing.assert_array_equal(batch["input_ids"][0, :total], [*second.input_ids, *first.input_ids])
    assert batch["segment_ids"][0, :total].tolist() == [1] * len(second) + [2] * len(first)
    assert batch["positions"][0, :total].tolist() == [*range(len(second)), *range(len(first))]
    assert batch["weights"][0, len(second)] == 0
    assert not batch["segment_ids"][0, total:].any() and not batch["segment_ids"][1].any()


@pytest.mark.parametrize("how", ["token", "example", "response", "nonzero"])
@pytest.mark.parametrize("mode", ["masked", "weighted"])
def test_normalised_loss_is_the_same_packed_or_not(how, mode, tokenizer):
    dataset = EncodedDataset.build(ROWS, tokenizer, mode=mode, prompt_weight=0.3, max_length=64)
    losses = np.random.default_rng(0).random((50_000,))

    def loss(batches):
        total = sum(float((batch["weights"] * losses[batch["input_ids"]]).sum()) for batch in batches)
        return total / sum(float(batch["counts"].sum()) for batch in batches)

    everything = np.arange(len(dataset))
    alone = [dataset.batch([index], how=how) for index in everything]
    together = [dataset.batch(everything, len(dataset) + 2, how=how)]
    packed = [dataset.batch([everything[:2], everything[2:]], 2, 256, how=how)]
    assert loss(alone) == pytest.approx(loss(together), rel=1e-6) == pytest.approx(loss(packed), rel=1e-6)


def test_marked_tokens(tokenizer):
    dataset = EncodedDataset.build(ROWS[:2], tokenizer)
    batch = dataset.batch([0, 1], extra={"kl_weights": "trained", "prompt_weights": "prompt"})
    np.testing.assert_array_equal(batch["kl_weights"], batch["weights"] > 0)
    for row, example in enumerate(dataset):
        marked = np.flatnonzero(batch["prompt_weights"][row])
        np.testing.assert_array_equal(marked, np.flatnonzero(example.segments == Segment.USER))
    with pytest.raises(ValueError, match="unknown kind of tokens 'other'"):
        dataset.batch([0], extra={"x": "other"})


def test_weights_of_rows_and_messages(tokenizer):
    rows = [
        Conversation((Message("user", "a"), Message("assistant", "b", weight=0.5)), weight=3.0),
        Conversation((Message("user", "a"), Message("assistant", "b")), weight=0.0),
    ]
    dataset = EncodedDataset.build(rows, tokenizer)
    assert dataset.report.dropped == {"no_weight": 1}
    assert dataset[0].weight == 3.0
    assert set(dataset[0].weights.tolist()) == {0.0, 0.5}
    batch = dataset.batch([0])
    assert set(batch["weights"][0].tolist()) == {0.0, 1.5}


def test_rows_without_a_template(tokenizer):
    rows = [Passage((("What is", 0.0), (" it?", 1.0))), TokenRow((5, 6, 7), (0.0, 0.0, 2.0)), TokenRow((5, 6, 7))]
    dataset = EncodedDataset.build(rows, tokenizer, mode="full")
    assert tokenizer.decode(dataset[0].input_ids) == "What is it?"
    assert tokenizer.decode(dataset[0].input_ids[dataset[0].weights > 0]) == " it?"
    assert dataset[1].weights.tolist() == [0, 0, 2]
    assert dataset[2].weights.tolist() == [0, 1, 1]


def test_describe_gives_each_tokens_text(tokenizer):
    [example] = EncodedDataset.build([row("a", "שלום 👩‍👩‍👧!")], tokenizer)
    told = describe_example(example, tokenizer)
    assert "".join(text for text, _, _ in told) == tokenizer.decode(example.input_ids.tolist())
    assert [weight for _, weight, _ in told] == example.weights.tolist()
    assert told[0] == ("<|im_start|>", 0.0, "template")
    assert ("<|im_end|>", 1.0, "end_of_turn") in told


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "word_piece"])
@pytest.mark.parametrize("text", ["", "👩‍👩‍👧", "a \ufffd b", "日本語", " x", "\U00100000\U00100000"])
def test_token_texts_join_to_the_decoded_text(kind, text, make_tokenizer):
    tokenizer = make_tokenizer(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(token_texts(ids, tokenizer)) == len(ids)
    assert "".join(token_texts(ids, tokenizer)) == tokenizer.decode(ids)
    assert len(token_texts(ids[:-1], tokenizer)) == max(len(ids) - 1, 0)


def test_inspect_is_json(tokenizer, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "What is 12 + 30?", "output": "42"}] * 3))
    seen = json.loads(json.dumps(inspect_data(path, tokenizer, examples=2, mode="unmasked", max_length=128)))
    assert (seen["format"], seen["rows"], seen["kept"], seen["dropped"]) == ("alpaca", 3, 3, {})
    assert seen["recommended_max_length"] == 64
    assert 0 < seen["trained_fraction"] < 1
    assert len(seen["examples"]) == 2
    example = seen["examples"][0]
    assert len(example["input_ids"]) == len(example["weights"]) == len(example["segments"])
    assert example["segments"][-2:] == ["end_of_turn", "template"]
    trained = {s for s, w in zip(example["segments"], example["weights"], strict=True) if w}
    assert trained == {"user", "assistant", "end_of_turn"}


@pytest.mark.shared
@pytest.mark.parametrize("mode", ["masked", "unmasked", "full", "weighted"])
def test_real_rows_with_a_real_tokenizer(mode, shared_dir):
    from mora_jax.data import load_tokenizer

    tokenizer = load_tokenizer(shared_dir / "models" / "stories260K")
    path = shared_dir / "data" / "instruct" / "llms_from_scratch_1100.json"
    dataset = EncodedDataset.build(load_rows(path), tokenizer, mode=mode, prompt_weight=0.1, vocab_size=512)
    report = dataset.report
    assert (report.rows, report.kept, report.template) == (1100, 1100, "alpaca")
    for example in dataset:
        assert (example.input_ids == tokenizer.bos_token_id).nonzero()[0].tolist() == [0]
        assert (example.input_ids == tokenizer.eos_token_id).nonzero()[0].tolist() == [len(example) - 1]
        assert (example.weights[0], example.weights[-1]) == (0, 1)
    expected = {"masked": 0.19, "unmasked": 0.38, "full": 0.99, "weighted": 0.38}
    assert report.trained_fraction == pytest.approx(expected[mode], abs=0.01)


def test_nothing_here_imports_jax_or_torch():
    heavy = {"jax", "flax", "torch", "transformers", "datasets"}
    code = f"import sys, mora_jax.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
