"""Rows of every format, and the one line that each kind of broken row gives."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from mora_jax.data import Conversation, Message, Passage, TokenRow
from mora_jax.data.formats.column_mapping import COLUMNS, ROLES, Mapping
from mora_jax.data.formats.load import Converter
from mora_jax.data.formats.registry import FORMATS, detect_format, find_format, recognise
from mora_jax.errors import InputError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def user(content, context="", **more):
    return Message("user", content, context, **more)


def assistant(content, **more):
    return Message("assistant", content, **more)


def convert(row, format=None):
    """The row's only result, without its source."""
    name = format or detect_format([("a.jsonl, row 1", row)]).name
    [result] = Converter(name, guessed=format is None)("a.jsonl, row 1", row)
    assert result.source.startswith("a.jsonl, row 1")
    return name, replace(result, source="")


SEGMENTS = [{"text": "a", "label": False}, {"text": "", "label": True}, {"text": "b", "label": 0.5}]


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("alpaca", {"instruction": "i", "output": "o"}, [user("i"), assistant("o")]),
        ("alpaca", {"instruction": "i", "input": "", "output": "o"}, [user("i"), assistant("o")]),
        ("alpaca", {"instruction": "i", "input": None, "output": "o"}, [user("i"), assistant("o")]),
        ("alpaca", {"instruction": "i", "input": float("nan"), "output": "o"}, [user("i"), assistant("o")]),
        ("question_answer", {"question": "q", "response": "a", "text": float("nan")}, [user("q"), assistant("a")]),
        ("alpaca", {"instruction": "i", "context": "c", "response": "o"}, [user("i", "c"), assistant("o")]),
        ("alpaca", {"instruction": "i", "input": "", "context": "c", "output": ""}, [user("i", "c"), assistant("")]),
        (
            "alpaca",
            {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["a", "b"], ["c", "d"]]},
            [
                Message("system", "s"),
                *(user("a"), assistant("b"), user("c"), assistant("d")),
                *(user("i", "x"), assistant("o")),
            ],
        ),
        ("alpaca", {"instruction": "i", "output": "o", "history": '[["a", "b"]]'}, [user("a"), assistant("b")]),
        ("alpaca", {"instruction": "i", "output": "o", "history": []}, [user("i"), assistant("o")]),
        ("alpaca", {"instruction": "i", "output": "o", "history": None, "text": "t"}, [user("i"), assistant("o")]),
        ("alpaca", {"instruction": "i", "output": "o", "history": "[]", "system": None}, [user("i"), assistant("o")]),
        ("alpaca", {"instruction": "i", "output": "o", "history": "", "system": ""}, [user("i"), assistant("o")]),
        (
            "messages",
            {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "u"}]},
            [Message("system", "s"), user("u")],
        ),
        ("messages", {"system": "s", "messages": [{"role": "user", "content": "u"}]}, [Message("system", "s")]),
        (
            "messages",
            {"system": "s", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
            [Message("system", "s"), user("u")],
        ),
        ("messages", {"messages": '[{"role": "user", "content": "u"}]'}, [user("u")]),
        ("messages", {"messages": [{"from": "human", "value": "u"}]}, [user("u")]),
        ("sharegpt", {"conversations": [{"role": "user", "content": "u"}]}, [user("u")]),
        (
            "sharegpt",
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "u", "weight": None},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "t"},
                    {"from": "gpt", "value": "a", "weight": 0},
                ],
            },
            [
                *(Message("system", "s"), user("u"), assistant("", tool_calls=(CALL,))),
                *(Message("tool", "t"), assistant("a", weight=0.0)),
            ],
        ),
        ("prompt_completion", {"prompt": "[p", "completion": "c"}, [user("[p"), assistant("c")]),
        (
            "prompt_completion",
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            [Message("system", "s"), user("u"), assistant("a")],
        ),
        ("question_answer", {"question": "q", "answer": "a"}, [user("q"), assistant("a")]),
        ("question_answer", {"query": "q", "response": "a", "system": ""}, [user("q"), assistant("a")]),
        (
            "self_instruct",
            {"instruction": "i", "instances": [{"input": "x", "output": "o"}]},
            [user("i", "x"), assistant("o")],
        ),
    ],
)
def test_conversations(name, row, messages):
    found, result = convert(row)
    assert found == name
    assert list(result.messages[: len(messages)]) == messages
    assert (result.text, result.weight, result.tools) == (None, 1.0, ())


@pytest.mark.parametrize(
    ("name", "row", "result"),
    [
        ("text", {"text": "one\ntwo"}, Conversation(text="one\ntwo")),
        ("segments", {"segments": SEGMENTS, "text": "x"}, Passage((("a", 0.0), ("", 1.0), ("b", 0.5)))),
        ("tokens", {"input_ids": [5, 6], "messages": []}, TokenRow((5, 6))),
        ("tokens", {"input_ids": [5, 6], "labels": [-100, 6]}, TokenRow((5, 6), (0.0, 1.0))),
        ("tokens", {"input_ids": [5, 6], "weights": [0, 0.5]}, TokenRow((5, 6), (0.0, 0.5))),
    ],
)
def test_rows_that_no_template_touches(name, row, result):
    assert convert(row) == (name, result)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]]])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "u"}]},
        {"conversations": [{"from": "human", "value": "u"}]},
        {"prompt": "u", "completion": "c"},
        {"instruction": "u", "output": "c"},
        {"question": "u", "answer": "c"},
    ],
)
def test_tools(row, tools):
    assert convert(row | {"tools": tools})[1].tools == (TOOL,)
    assert convert(row | {"functions": tools, "tools": "[]"})[1].tools == (TOOL,)
    for nothing in (None, "", [], "[]", "null"):
        assert convert(row | {"tools": nothing, "functions": nothing})[1].tools == ()


def test_a_null_instruction_is_no_other_format():
    row = {"instruction": None, "input": "x", "output": "o"}
    with pytest.raises(InputError, match="`instruction` is null; expected text"):
        convert(row)
    with pytest.raises(InputError, match="`instruction` is null; expected text"):
        Converter("alpaca", guessed=True)("a.jsonl, row 1", row)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "i", "output": "o"},
        {"messages": [{"role": "user", "content": "u"}]},
        {"text": "t"},
        {"segments": SEGMENTS},
        {"input_ids": [1]},
    ],
)
@pytest.mark.parametrize(
    ("value", "weight"), [(0, 0.0), (2.5, 2.5), ("0.25", 0.25), (" 3 ", 3.0), ("", 1.0), (None, 1.0)]
)
def test_the_weight_of_a_row(row, value, weight):
    assert convert(row | {"weight": value})[1].weight == weight


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), "nan", "-1", "70 kg", True, [], {}, 1e38, 10**400])
def test_weights_that_are_none(value):
    with pytest.raises(
        InputError, match=r"a\.jsonl, row 1: `weight` is .*; expected a weight, a number from 0 to 1e\+15"
    ):
        convert({"text": "t", "weight": value})


def test_a_row_of_several_instances():
    row = {"instruction": "i", "weight": 2, "instances": [{"input": "x", "output": "o"}, {"output": "p"}]}
    results = Converter("self_instruct")("a, row 1", row)
    assert [result.messages[-1].content for result in results] == ["o", "p"]
    assert [result.weight for result in results] == [2.0, 2.0]
    assert results[1].source == "a, row 1, `instances[1]`"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"no format has the columns \(none\): name those to read in data.columns"),
        ({f"k{i}": 1 for i in range(1000)}, "'k7' and 992 more: name those to read"),
        ({"x" * 1000: 1}, r"'x{56}\.\.\.: name those"),
        ({"version": 1, "data": [{"instruction": "i"}]}, "one object, with the rows in its list 'data': write that"),
        ({"instruction": float("nan"), "output": "o"}, "`instruction` is null; expected text"),
        (3, "a row should be an object with keys and is a number"),
        (None, "a row should be an object with keys and is missing or null"),
        ({"instruction": "i", "output": None}, "`output` or `response` is null; expected text"),
        ({"instruction": None, "output": "o"}, "`instruction` is null; expected text"),
        ({"instruction": 5, "output": "o"}, "`instruction` should be text and is a number"),
        ({"instruction": {"a": 1}, "output": "o"}, "`instruction` should be text and is an object"),
        ({"instruction": "i", "output": "\ud800!"}, r"`output` .*lone surrogate \\ud800 at character 0"),
        ({"instruction": "i", "output": "o", "input": "x\udfff"}, r"`input` .*surrogate \\udfff at character 1"),
        ({"instruction": "i", "output": "o", "system": ["s"]}, "`system` should be text and is a list"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, r"`history\[0\]` should be a pair of texts"),
        ({"instruction": "i", "output": "o", "history": [["a", None]]}, r"`history\[0\]\[1\]` .*missing or null"),
        ({"instruction": "i", "output": "o", "history": [None]}, r"`history\[0\]` should be a pair"),
        ({"instruction": "i", "output": "o", "history": "ab"}, "`history` should be a filled list and is text"),
        ({"messages": []}, "`messages` should be a filled list and is empty"),
        ({"messages": "hi"}, "`messages` should be a filled list and is text"),
        ({"messages": "[hi"}, "`messages` is text that is no JSON"),
        ({"messages": "[" * 100_000}, "`messages` is JSON nested too deeply"),
        ({"messages": {"role": ["user"]}}, "`messages` should be a filled list and is an object"),
        ({"messages": [None]}, r"`messages\[0\]` should be an object with .* and is missing or null"),
        ({"messages": [{"content": "hi"}]}, r"`messages\[0\]` has no `role`; expected one of system"),
        ({"conversations": [{"value": "hi"}]}, r"`conversations\[0\]` has no `from`; expected one of system"),
        ({"prompt": [{"content": "p"}], "completion": "c"}, r"`prompt\[0\]` has no `role`"),
        ({"prompt": "p", "completion": {}}, "`completion` should be text and is an object"),
        ({"question": 12, "answer": "a"}, "`question` should be text and is a number"),
        ({"question": "q", "answer": True}, "`answer` should be text and is a boolean"),
        ({"question": "q", "answer": float("inf")}, "`answer` should be text and is a number"),
        ({"instruction": "i", "instances": []}, "`instances` should be a filled list and is empty"),
        ({"instruction": "i", "instances": [None]}, r"`instances\[0\]` should be an object .* missing or null"),
        ({"instruction": "i", "instances": [{}]}, r"`instances\[0\]`: `output` or `response` is missing"),
        ({"text": ["t"]}, "`text` should be text and is a list"),
        ({"messages": [{"role": "user", "content": "u"}], "tools": "f"}, "`tools` should be a filled list"),
    ],
)
def test_broken_rows(row, message):
    with pytest.raises(InputError, match=message) as caught:
        convert(row)
    assert str(caught.value).startswith("a.jsonl, row 1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value, text", [(12, "12"), (8.0, "8"), (-0.5, "-0.5"), ("8.0", "8.0"), (1e20, "1" + "0" * 20)]
)
def test_a_number_as_an_answer_is_its_text(value, text):
    rows = [
        {"question": "q", "answer": value},
        {"prompt": "q", "completion": value},
        {"instruction": "q", "output": value},
    ]
    for row in rows:
        assert convert(row)[1].messages[-1].content == text


def test_sums_whose_question_has_a_passage_are_mapped_whole():
    row = {"ID": "1", "Body": "There are 87 oranges.", "Question": "How many?", "Equation": "87 - 7", "Answer": 80.0}
    with pytest.raises(InputError, match="set data.columns to answer=Answer,question=Question,context=Body;"):
        detect_format([("r1", row)])
    with pytest.raises(InputError, match="set data.columns to answer=Answer,question=Question,context=Context;"):
        detect_format([("r1", {**row, "Context": "Jane has them."})])


def test_the_first_row_that_is_recognised_decides():
    rows = [("r1", {"instruction": "i", "output": None}), ("r2", {"instruction": "i", "output": "o"})]
    assert detect_format(rows).name == "alpaca"
    assert recognise(rows[0][1]) is None
    assert recognise([1]) is None
    with pytest.raises(InputError, match="r1: no format has"):
        detect_format([("r1", {"a": 1}), ("r2", {"b": 1})])


def test_a_row_of_another_format():
    converter = Converter("alpaca", guessed=True)
    with pytest.raises(InputError, match=r"r: mixed formats: this row is of format `text`, others are of `alpaca`"):
        converter("r", {"text": "t"})
    with pytest.raises(InputError, match="r: `output` or `response` is missing"):
        converter("r", {"instruction": "i"})
    with pytest.raises(InputError, match="r: a row should be an object with keys and is a list; expected `instr"):
        converter("r", ["i", "o"])
    # A format that is asked for is not compared with others.
    with pytest.raises(InputError, match="r: `instruction` is missing; expected text"):
        Converter("alpaca")("r", {"text": "t"})


def test_a_format_that_does_not_exist():
    with pytest.raises(InputError, match="unknown data format 'alpacca': choose one of " + ", ".join(FORMATS)):
        find_format("alpacca")
    assert all(find_format(name).name == name for name in FORMATS)


def attempt(function):
    """What a function gives, or the `InputError` that it raises."""
    try:
        return function()
    except InputError as error:
        return error


KEYS = st.sampled_from([*COLUMNS, "function_call", "function", "arguments", "type", "id"])
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-101, 3)
    | st.floats()
    | st.text(st.characters(), max_size=3)
    | st.sampled_from([*ROLES, "[", "[1]", "{}", '[{"name": "f"}]', "\ud800", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)
ROWS = st.dictionaries(KEYS, ANYTHING, max_size=6)
MAPPING = Mapping.parse(("instruction=query", "from=role", "ignore=id"), ("tool=function_call",))


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(sorted(FORMATS)), ROWS | ANYTHING, st.sampled_from([Mapping(), MAPPING]), st.booleans())
def test_any_row_is_read_or_refused_in_one_line(name, row, mapping, guessed):
    before = repr(row)
    results = attempt(lambda: Converter(name, guessed, mapping)("r", row))
    if isinstance(results, InputError):
        assert str(results).startswith("r")
        assert "\n" not in str(results)
    else:
        assert results
        for result in results:
            str(result).encode()
            assert 0 <= result.weight < float("inf")
    assert repr(row) == before


@settings(deadline=None)
@given(st.lists(st.tuples(st.just("r"), ROWS), min_size=1, max_size=3))
def test_any_rows_are_of_a_format_or_of_none(rows):
    result = attempt(lambda: detect_format(rows))
    assert str(result).startswith("r: ") if isinstance(result, InputError) else result.name in FORMATS
