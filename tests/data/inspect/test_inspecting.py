"""What inspect gives to scripts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mora_jax.data import Conversation, EncodedDataset, LossWeights, Message, Segment, describe_batch, inspect_data
from mora_jax.data.inspect.views import inspect_dataset, repeated_prompts, segment_table


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("byte_level", "chatml")


def row(question, answer, weight=1.0, message_weight=None):
    messages = (Message("user", question), Message("assistant", answer, weight=message_weight))
    return Conversation(messages, weight=weight)


def test_one_object_with_everything(tokenizer, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": f"Say {n}", "output": "The answer is yes."} for n in range(5)]))
    found = inspect_data(path, tokenizer, max_length=128)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {"format", "rows", "kept", "dropped", "trained_fraction", "ratio", "recommended_max_length"} <= found.keys()
    assert (found["format"], found["rows"], found["kept"], found["dropped"]) == ("alpaca", 5, 5, {})
    assert found["advice"].startswith(f"{found['advice_details']['mode']}: ")
    assert found["advice_details"].keys() == {"mode", "prompt_weight", "confidence", "evidence", "limits"}
    assert found["capacity"].startswith(f"at most about {found['trained_tokens']} bits to learn")
    assert found["duplicates"] == {"rows": 0, "fraction": 0.0}
    assert sum(found["histogram"]["rows"]) == 5
    assert found["segments"]["assistant"]["mean_weight"] == 1.0
    assert found["segments"]["user"]["mean_weight"] == 0.0
    assert sum(kind["tokens"] for kind in found["segments"].values()) == found["tokens"]
    assert found["examples"] == []


def test_bad_rows_are_counted_and_told(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"x": 1}\n'
    )
    found = inspect_data(path, tokenizer, on_error="skip")
    assert (found["rows"], found["kept"], found["dropped"]) == (2, 1, {"bad_row": 1})
    assert "row 2" in found["bad_rows"][0]


@pytest.mark.parametrize("mode", ["masked", "unmasked", "weighted", "full"])
def test_examples_carry_the_weights_of_training(mode, tokenizer):
    rows = [row("a b", "c", weight=0.5), row("What?", "It is 42.", message_weight=3.0), row("x", "y")]
    dataset = EncodedDataset.build(rows, tokenizer, mode=mode, prompt_weight=0.25)
    shown = inspect_dataset(dataset, examples=3)["examples"]
    batch = dataset.batch(range(3))
    for place, example in enumerate(shown):
        assert example.keys() == {"input_ids", "weights", "segments"}
        length = len(example["input_ids"])
        assert length == len(example["weights"]) == len(example["segments"])
        assert example["weights"][0] == 0.0
        np.testing.assert_array_equal(example["weights"], batch["weights"][place, :length])
        np.testing.assert_array_equal(example["input_ids"], batch["input_ids"][place, :length])
    assert 0.5 in shown[0]["weights"]
    assert 3.0 in shown[1]["weights"]
    names = {Segment(value).label for value in dataset[0].segments.tolist()}
    assert set(shown[0]["segments"]) == names


def test_no_more_examples_than_there_are(tokenizer):
    assert len(inspect_dataset(EncodedDataset.build([row("a", "b")], tokenizer), 9)["examples"]) == 1


def test_repeated_prompts_come_by_frequency(tokenizer):
    rows = [row("once", "a"), *[row("twice", str(n)) for n in range(2)], *[row("\x1b[31mred", "b")] * 3]
    dataset = EncodedDataset.build(rows, tokenizer)
    assert repeated_prompts(dataset, tokenizer) == [("\\x1b[31mred", 3), ("twice", 2)]
    assert len(repeated_prompts(dataset, tokenizer, most=1)) == 1
    long = EncodedDataset.build([row("word " * 60, "a")] * 2, tokenizer)
    [(text, count)] = repeated_prompts(long, tokenizer)
    assert len(text) == 80 and text.endswith("...") and count == 2


def test_segments_of_one_name_are_one_line(tokenizer):
    report = EncodedDataset.build([row("a", "b")], tokenizer).report
    names = [name for name, _, _ in segment_table(report)]
    assert len(names) == len(set(names))
    assert sum(count for _, count, _ in segment_table(report)) == report.tokens


def test_settings_in_words():
    assert LossWeights().words == "masked"
    assert LossWeights("weighted", 0.25, headers="all").words == "weighted, prompt_weight 0.25, headers all"
    words = LossWeights("masked", roles=("user", "assistant"), end_of_turn="last").words
    assert words == "masked, roles user and assistant, end_of_turn last"


def test_batches_in_words(tokenizer):
    dataset = EncodedDataset.build([row("a", "b"), row("What is 12 + 30?", "It is 42.")], tokenizer)
    batch = dataset.batch([np.array([0, 1]), np.array([1])], 3, 128)
    lines = describe_batch(batch).splitlines()
    assert "int32    [3, 128]" in lines[0]
    trained = [np.count_nonzero(example.weights) for example in dataset]
    padding = 128 - len(dataset[0]) - len(dataset[1])
    assert lines[-3] == f"       row 0  2 examples, {sum(trained)} of 128 tokens trained, {padding} padding"
    assert lines[-1] == "       row 2  0 examples, 0 of 128 tokens trained, 128 padding"
    stacked = {name: value.reshape(3, 1, *value.shape[1:]) for name, value in batch.items()}
    assert describe_batch(stacked).splitlines()[-3:] == lines[-3:]
