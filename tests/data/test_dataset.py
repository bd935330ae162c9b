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
    Message,
    Rows,
    Segment,
    describe_example,
    inspect_data,
    load_examples,
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
    assert [len(example) for example in dataset.examples][-1] == 64
    assert all(example.weights.any() for example in dataset.examples)


def test_drop_instead_of_cut(tokenizer):
    report = EncodedDataset.build(ROWS, tokenizer, max_length=64, truncation="drop").report
    assert (report.kept, report.truncated) == (2, 0)
    assert report.dropped == {"too_long": 2, "no_answer": 1}


def test_counts_of_the_report(tokenizer):
    dataset = EncodedDataset.build(ROWS[:2], tokenizer)
    report = dataset.report
    segments = np.concatenate([example.segments for example in dataset.examples])
    response = np.isin(segments, [Segment.ASSISTANT, Segment.END_OF_TURN]).sum()
    assert report.tokens == len(segments)
    assert report.trained_tokens == response
    assert report.trained_fraction == pytest.approx(response / len(segments))
    ratio = (segments == Segment.USER).sum() / (segments == Segment.ASSISTANT).sum()
    assert report.ratio == pytest.approx(ratio)
    assert report.quantiles["longest"] == max(map(len, dataset.examples))
    assert report.recommended_max_length == 64
    text = str(report)
    assert "2 read, 2 kept" in text
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
            r"none of the 1 rows .*raise max_length \(now 64; half .* at most \d{3}",
        ),
        (
            ROWS[2:3],
            {"max_length": 64, "truncation": "drop"},
            "raise max_length .* or set truncation to `right`",
        ),
        (ROWS[3:4], {}, "no answer to train on.*loss mode to `unmasked`"),
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
    with pytest.raises(
        InputError, match=r"f\.json, row 9: token '.+' has id \d+, outside the model's 50 embeddings"
    ):
        EncodedDataset.build(rows, tokenizer, vocab_size=50)


def test_batch_pads_tokens_and_rows(tokenizer):
    dataset = EncodedDataset.build(ROWS[:2], tokenizer)
    first, second = dataset.examples
    assert dataset.batch_length == 64
    batch = dataset.batch([1, 0], batch_size=3)
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "input_ids": ((3, 64), "int32"),
        "segment_ids": ((3, 64), "int32"),
        "weights": ((3, 64), "float32"),
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
    with pytest.raises(ValueError, match=r"2 examples .* do not fit \[1, 64\]"):
        dataset.batch([0, 1], 1, 64)
    with pytest.raises(ValueError, match=r"do not fit \[1, 4\]"):
        dataset.batch([0], 1, 4)


def test_split_is_the_same_for_the_same_seed():
    rows = [row(str(i)) for i in range(20)]
    train, held_out = split_rows(rows, 0.25, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted([*train, *held_out], key=rows.index) == rows
    assert (train, held_out) == split_rows(rows, 0.25, seed=3)
    assert list(held_out) != list(split_rows(rows, 0.25, seed=4)[1])
    assert split_rows(Rows(rows, "alpaca", ("f",)), 0.25)[1].format == "alpaca"
    assert len(split_rows(rows, 0.001)[1]) == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 0.99])
def test_split_that_leaves_nothing(fraction):
    with pytest.raises(InputError, match="eval_fraction"):
        split_rows([row("a"), row("b")], fraction)


def test_describe_gives_each_tokens_text(tokenizer):
    [example] = EncodedDataset.build([row("a", "שלום 👩‍👩‍👧!")], tokenizer).examples
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
    dataset = load_examples(path, tokenizer, mode=mode, prompt_weight=0.1, vocab_size=512)
    report = dataset.report
    assert (report.rows, report.kept, report.template) == (1100, 1100, "alpaca")
    for example in dataset.examples:
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
