"""Rows that judge answers: the forms in which they are published, and what is refused."""

from __future__ import annotations

import json

import pytest

from mora_jax.data import Conversation, Message, Passage, load_rows
from mora_jax.data.conversation import Side
from mora_jax.data.formats.registry import recognise
from mora_jax.errors import InputError


def user(text):
    return Message("user", text)


def assistant(text):
    return Message("assistant", text)


ASK = {"role": "user", "content": "Two plus two?"}
FOUR, FIVE = ({"role": "assistant", "content": text} for text in ("Four.", "Five."))
BRIEF = {"role": "system", "content": "Be brief."}
PLAIN = ([user("Two plus two?")], [assistant("Four.")], [assistant("Five.")])
HUMAN = "\n\nHuman: Two plus two?\n\nAssistant:"

#: Rows, and the prompt and both answers that they mean.
PAIRS = {
    "texts": ({"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."}, PLAIN),
    "messages": ({"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]}, PLAIN),
    "no prompt": ({"chosen": [ASK, FOUR], "rejected": [ASK, FIVE]}, PLAIN),
    "one message": ({"prompt": "Two plus two?", "chosen": FOUR, "rejected": FIVE}, PLAIN),
    "ultrafeedback": (
        {"prompt": "Two plus two?", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE], "messages": [ASK, FOUR]},
        PLAIN,
    ),
    "orca": ({"system": "", "question": "Two plus two?", "chosen": "Four.", "rejected": "Five."}, PLAIN),
    "orca with a system message": (
        {"system": "Be brief.", "question": "Two plus two?", "chosen": "Four.", "rejected": "Five."},
        ([Message("system", "Be brief."), user("Two plus two?")], *PLAIN[1:]),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "Two plus two?"},
            ],
            "chosen": {"from": "gpt", "value": "Four."},
            "rejected": {"from": "gpt", "value": "Five."},
        },
        ([Message("system", "Be brief."), user("Hi"), assistant("Hello"), user("Two plus two?")], *PLAIN[1:]),
    ),
    "hh-rlhf": (
        {
            "chosen": f"\n\nHuman: Hi\n\nAssistant: Hello{HUMAN} Four.",
            "rejected": f"\n\nHuman: Hi\n\nAssistant: Hello{HUMAN} Five.",
        },
        ([user("Hi"), assistant("Hello"), user("Two plus two?")], *PLAIN[1:]),
    ),
    "hh-rlhf with a prompt": (
        {"prompt": HUMAN, "chosen": " Four.", "rejected": "Five."},
        ([user("Two plus two?")], [assistant(" Four.")], [assistant("Five.")]),
    ),
    "a system message in the answers alone": (
        {"prompt": "Two plus two?", "chosen": [BRIEF, ASK, FOUR], "rejected": [BRIEF, ASK, FIVE]},
        ([Message("system", "Be brief."), *PLAIN[0]], *PLAIN[1:]),
    ),
    "a system message beside answers with their prompt": (
        {"system": "Be brief.", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
        ([Message("system", "Be brief."), *PLAIN[0]], *PLAIN[1:]),
    ),
    "alpaca with a history": (
        {"instruction": "Two plus two?", "history": [["Hi", "Hello"]], "chosen": "Four.", "rejected": "Five."},
        ([user("Hi"), assistant("Hello"), user("Two plus two?")], *PLAIN[1:]),
    ),
    "numbers": ({"prompt": 4, "chosen": 5, "rejected": 6}, ([user("4")], [assistant("5")], [assistant("6")])),
    "answers of several turns": (
        {"chosen": [ASK, FOUR, ASK, FOUR], "rejected": [ASK, FOUR, ASK, FIVE]},
        ([user("Two plus two?"), assistant("Four."), user("Two plus two?")], *PLAIN[1:]),
    ),
    "an answer goes on": (
        {"prompt": [ASK], "chosen": [FOUR, ASK, FOUR], "rejected": [FIVE]},
        (PLAIN[0], [assistant("Four."), user("Two plus two?"), assistant("Four.")], PLAIN[2]),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    row, (prompt, chosen, rejected) = PAIRS[name]
    rows = load_rows([row, row])
    assert rows.format == "preference" and len(rows) == 4
    for item, answer, side in zip(rows[:2], (chosen, rejected), (Side.CHOSEN, Side.REJECTED), strict=True):
        assert isinstance(item, Conversation)
        assert list(item.messages) == [*prompt, *answer]
        assert (item.side, item.answer) == (side, len(prompt))
        assert item.source.endswith(f"row 1, {side.name.lower()}")


def test_texts_that_share_a_beginning_are_continued():
    first, second = load_rows([{"chosen": "The sky is blue.", "rejected": "The sky is green."}])
    assert isinstance(first, Passage)
    assert first.parts == (("The sky is", 0.0), (" blue.", 1.0)) and second.parts[1] == (" green.", 1.0)


def test_labels():
    rows = load_rows(
        [
            {"prompt": "Two plus two?", "completion": "Four.", "label": True},
            {"prompt": [ASK], "completion": [FIVE], "label": False},
            {"prompt": "Two plus two?", "completion": "Six.", "label": "False"},
            {"prompt": "Two plus two?", "completion": [BRIEF, ASK, FOUR], "label": True},
        ]
    )
    assert rows.format == "labelled"
    assert [row.side for row in rows] == [Side.DESIRED, Side.UNDESIRED, Side.UNDESIRED, Side.DESIRED]
    assert list(rows[3].messages) == [Message("system", "Be brief."), user("Two plus two?"), assistant("Four.")]
    assert list(rows[1].messages) == [user("Two plus two?"), assistant("Five.")] and rows[1].answer == 1


@pytest.mark.parametrize("true, false", [("True", "False"), ("true", "FALSE"), (" true ", "false")])
def test_labels_of_a_table(tmp_path, true, false):
    path = tmp_path / "kto.csv"
    path.write_text(f"prompt,completion,label\nTwo plus two?,Four.,{true}\nTwo plus two?,Five.,{false}\n")
    rows = load_rows(str(path))
    assert rows.format == "labelled" and [row.side for row in rows] == [Side.DESIRED, Side.UNDESIRED]


@pytest.mark.parametrize("ones", [(1, 0), (1.0, 0.0), ("1", "0"), ("1.0", "0.0")])
def test_ones_and_zeros_are_labels_where_the_format_is_named(ones):
    given = [{"prompt": "Two plus two?", "completion": "Four.", "label": label} for label in ones]
    rows = load_rows(given, format="labelled")
    assert [row.side for row in rows] == [Side.DESIRED, Side.UNDESIRED]


@pytest.mark.parametrize("label", [0, 1, 3, "1"])
def test_a_column_of_classes_is_no_label(label):
    assert recognise({"prompt": "Two?", "completion": "Four.", "label": label}).name == "prompt_completion"


GOOD = {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."}
REFUSED = {
    "no other half": ({"prompt": "Hi", "chosen": "Four."}, "`rejected` is missing or empty: a pair has"),
    "an empty half": (GOOD | {"rejected": ""}, "`rejected` is missing or empty"),
    "a null half": (GOOD | {"chosen": None}, "`chosen` is missing or empty"),
    "no half of a conversation": (
        {"conversations": [{"from": "human", "value": "Hi"}], "rejected": {"from": "gpt", "value": "No"}},
        "`chosen` is missing or empty",
    ),
    "equal answers": (GOOD | {"rejected": "Four."}, "`chosen` and `rejected` are equal"),
    "other prompts": (
        {"chosen": [ASK, FOUR], "rejected": [ASK | {"content": "Three plus two?"}, FIVE]},
        "`chosen` and `rejected` answer different prompts",
    ),
    "other system messages": (
        GOOD | {"chosen": [BRIEF, ASK, FOUR], "rejected": [BRIEF | {"content": "Be long."}, ASK, FIVE]},
        "prompt and answers begin with different system messages",
    ),
    "a system message before no prompt": (
        {"system": "Be brief.", "chosen": "The sky is blue.", "rejected": "The sky is red."},
        "there is a system message and no `prompt`",
    ),
    "another prompt than the row's": (
        GOOD | {"chosen": [ASK | {"content": "No?"}, FOUR]},
        "`chosen` begins with another prompt",
    ),
    "transcripts of other prompts": (
        {"chosen": f"{HUMAN} Four.", "rejected": "\n\nHuman: Hi\n\nAssistant: Five."},
        "answer different prompts",
    ),
    "a prompt and nothing else": ({"chosen": [ASK, FOUR], "rejected": [ASK]}, "and `rejected` ends there"),
    "texts without a prompt": ({"chosen": "Four.", "rejected": "Five."}, None),
    "texts that share nothing": ({"chosen": "Six.", "rejected": "Five."}, "there is no `prompt`"),
    "a number": (GOOD | {"chosen": [3]}, "should be an object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_pair(name):
    row, words = REFUSED[name]
    if words is None:
        assert len(load_rows([GOOD, row])) == 4
        return
    with pytest.raises(InputError, match=words) as caught:
        load_rows([GOOD, row])
    assert "row 2" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [3, "yes", None, 0.5, [True]])
def test_what_is_no_label(label):
    good = {"prompt": "Hi", "completion": "Hello", "label": True}
    with pytest.raises(InputError, match=r"row 2: .*`label` is .*; expected true or false"):
        load_rows([good, good | {"label": label}])


def test_half_a_pair_alone_says_what_it_lacks():
    with pytest.raises(InputError, match="the row has `chosen` and no `rejected`"):
        load_rows([{"prompt": "Hi", "chosen": "Hello"}])


def test_ties_may_be_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [GOOD, GOOD | {"rejected": "Four."}, GOOD])))
    rows = load_rows(path, on_error="skip")
    assert len(rows) == 4 and rows.skipped.count == 1
