"""Messages of chat formats, with tools, names, weights and reasoning."""

from __future__ import annotations

import json

import pytest

from mora_jax.data import Message
from mora_jax.data.formats.column_mapping import ROLES, Mapping
from mora_jax.data.formats.messages import read_calls, read_message, read_tools, read_turns
from mora_jax.errors import InputError


def call(name="f", arguments=None, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments or {}}, **more}


def read(item):
    return read_message(item, "messages[2]", "a.jsonl, row 7")


@pytest.mark.parametrize(("role", "ours"), sorted(ROLES.items()))
def test_roles(role, ours):
    content = '{"name": "f"}' if role in ("function_call", "tool_call") else "c"
    assert read({"role": role, "content": content}).role == ours


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "u"}, {"text": "v"}]}, Message("user", "uv")),
        ({"role": "user", "content": []}, Message("user", "")),
        ({"role": "user", "content": " \n u\t"}, Message("user", " \n u\t")),
        ({"role": "user", "content": "u", "name": "Ann"}, Message("user", "u", name="Ann")),
        ({"role": "user", "content": "u", "name": None, "weight": 2}, Message("user", "u", weight=2.0)),
        ({"role": "assistant", "content": "a", "weight": 0}, Message("assistant", "a", weight=0.0)),
        ({"role": "assistant", "content": "a", "weight": 0.25}, Message("assistant", "a", weight=0.25)),
        ({"role": "assistant", "content": "a", "train": True}, Message("assistant", "a", weight=1.0)),
        ({"role": "assistant", "content": "a", "train": False}, Message("assistant", "a", weight=0.0)),
        ({"role": "assistant", "content": "a", "train": None, "tool_calls": None}, Message("assistant", "a")),
        ({"role": "assistant", "content": "a", "reasoning_content": "r"}, Message("assistant", "a", reasoning="r")),
        ({"role": "user", "content": "u", "reasoning_content": "", "tool_calls": []}, Message("user", "u")),
        (
            {"role": "assistant", "content": None, "tool_calls": [call(arguments={"x": [1, None]}, id="7")]},
            Message("assistant", "", tool_calls=(call(arguments={"x": [1, None]}, id="7"),)),
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": '{"x": "ü"}'}]},
            Message("assistant", "a", tool_calls=(call(arguments={"x": "ü"}),)),
        ),
        (
            {"role": "assistant", "tool_calls": json.dumps([call(), call("g")])},
            Message("assistant", "", tool_calls=(call(), call("g"))),
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
            Message("assistant", "", tool_calls=(call(),)),
        ),
        (
            {"role": "function_call", "content": '[{"name": "f"}, {"name": "g", "arguments": {"y": 2}}]'},
            Message("assistant", "", tool_calls=(call(), call("g", {"y": 2}))),
        ),
    ],
)
def test_messages(item, message):
    assert read(item) == message


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (None, "`messages[2]` should be an object with `role` and `content`, and is missing or null"),
        ("hi", "`messages[2]` should be an object with `role` and `content`, and is text"),
        ({"content": "c"}, "`messages[2]` has no `role`; expected one of system, developer"),
        ({"role": None, "content": "c"}, "`messages[2]` has no `role`"),
        ({"role": "bot", "content": "c"}, "`messages[2].role` is 'bot'; expected one of system"),
        ({"role": [], "content": "c"}, "`messages[2].role` is []; expected one of"),
        ({"role": "x" * 500, "content": "c"}, "..."),
        ({"role": "user"}, "`messages[2].content` should be text and is missing or null"),
        ({"role": "assistant", "content": None}, "`messages[2].content` should be text and is missing or null"),
        ({"role": "user", "content": 5}, "`messages[2].content` should be text and is a number"),
        ({"role": "user", "content": [None]}, "only text can be trained"),
        ({"role": "user", "content": ["u"]}, "only text can be trained"),
        ({"role": "user", "content": [{"type": "image"}]}, "`messages[2].content[0]` should be"),
        ({"role": "user", "content": [{"type": "text"}]}, "`messages[2].content[0].text` should be text and is miss"),
        ({"role": "user", "content": "\ud800"}, "`messages[2].content` holds a lone surrogate"),
        ({"role": "user", "content": "u", "name": 3}, "`messages[2].name` should be text"),
        ({"role": "user", "content": "u", "weight": -1}, "`messages[2].weight` is -1; expected a weight"),
        ({"role": "user", "content": "u", "weight": float("nan")}, "`messages[2].weight` is nan; expected a weight"),
        ({"role": "user", "content": "u", "weight": float("inf")}, "`messages[2].weight` is inf"),
        ({"role": "user", "content": "u", "weight": True}, "`messages[2].weight` is True"),
        ({"role": "user", "content": "u", "train": 1}, "`messages[2].train` is 1; expected true or false"),
        ({"role": "user", "content": "u", "train": True, "weight": 1}, "both `weight` and `train`"),
        ({"role": "user", "content": "u", "reasoning_content": "r"}, "`messages[2].reasoning_content` belongs to an"),
        ({"role": "tool", "content": "u", "tool_calls": [call()]}, "`messages[2].tool_calls` belongs to an assistant"),
        ({"role": "assistant", "tool_calls": "f"}, "`messages[2].tool_calls` should be a filled list and is text"),
        ({"role": "assistant", "tool_calls": [None]}, "`messages[2].tool_calls[0]` should be an object"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "`messages[2].tool_calls[0].name` should be text"),
        ({"role": "assistant", "tool_calls": [{"function": "f"}]}, "`messages[2].tool_calls[0].function` should be an"),
        ({"role": "assistant", "tool_calls": [call() | {"id": 1}]}, "`messages[2].tool_calls[0].id` should be text"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}, "arguments` is text that is no JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[]"}]}, "arguments` should be an object or"),
        (
            {"role": "assistant", "tool_calls": [call(arguments={"x": "\ud800"})]},
            "`messages[2].tool_calls[0].function.arguments` holds a lone surrogate",
        ),
        ({"role": "function_call", "content": "do it"}, "`messages[2].content` is text that is no JSON"),
        ({"role": "function_call", "content": "[]"}, "`messages[2].content` should be a filled list and is empty"),
        ({"role": "function_call", "content": "3"}, "`messages[2].content` should be an object"),
        ({"role": "function_call", "content": None}, "`messages[2].content` should be an object"),
    ],
)
def test_broken_messages(item, message):
    with pytest.raises(InputError) as caught:
        read(item)
    assert str(caught.value).startswith("a.jsonl, row 7: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_mapped_roles():
    mapping = Mapping(roles={"bot": "gpt", "user": "assistant", "calls": "function_call"})
    items = [
        {"role": "bot", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "calls", "content": '{"name": "f"}'},
    ]
    turns = read_turns(items, "messages", "s", mapping)
    assert [turn.role for turn in turns] == ["assistant"] * 3
    assert turns[2].tool_calls == (call(),)
    with pytest.raises(InputError, match=r"`messages\[0\].role` is 'nobody'; expected one of bot, user, calls, system"):
        read_turns([{"role": "nobody", "content": ""}], "messages", "s", mapping)


NOTHING = [None, "", " \n", [], "[]", " [] ", "null"]


@pytest.mark.parametrize("nothing", NOTHING)
def test_no_tools_and_no_calls(nothing):
    assert read_tools(nothing, "tools", "s") == read_calls(nothing, "tool_calls", "s") == ()


@pytest.mark.parametrize("nothing", [*NOTHING[:3], "null", {}, {"name": None, "arguments": None}])
def test_no_older_call(nothing):
    assert read({"role": "assistant", "content": "a", "function_call": nothing}) == Message("assistant", "a")


@pytest.mark.parametrize(
    "more",
    [
        {"name": "", "tool_call_id": None, "reasoning_content": None, "reasoning": "", "thinking": None},
        {"weight": "", "train": "", "loss": None},
        {"loss": 2.31},  # A measured one, not a mark.
    ],
)
def test_keys_that_say_nothing(more):
    assert read({"role": "user", "content": "u"} | more) == Message("user", "u")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_each_name(key):
    item = {"role": "assistant", "content": "a", "reasoning_content": None, "reasoning": "", "thinking": None}
    assert read(item | {key: "r"}).reasoning == "r"
    with pytest.raises(InputError, match=rf"`messages\[2\].{key}` belongs to an assistant's message"):
        read({"role": "user", "content": "a", key: "r"})


def test_turns_of_three_kinds():
    expected = [Message("user", "a"), Message("assistant", "b")]
    assert read_turns(["a", "b"], "conversations", "s", Mapping()) == expected
    assert read_turns([{"input": "a", "output": "b"}], "conversation", "s", Mapping()) == expected
    turns = [{"role": "USER", "content": "a"}, {"from": "Gpt", "value": "b"}]
    assert read_turns(turns, "m", "s", Mapping()) == expected
    with pytest.raises(InputError, match=r"s: `m\[0\].output` should be text and is missing or null"):
        read_turns([{"input": "a", "output": None}], "m", "s", Mapping())
    with pytest.raises(InputError, match=r"s: `m\[1\]` should be an object with `role` and `content`, and is text"):
        read_turns([{"role": "user", "content": "a"}, "b"], "m", "s", Mapping())


def test_where_a_role_may_be():
    with pytest.raises(InputError, match=r"`m\[0\]` has no `role`; .* in data.columns, such as \"role=speaker\""):
        read_turns([{"speaker": "user", "content": "a"}], "m", "s", Mapping())


def test_lists_as_python_writes_them():
    with pytest.raises(InputError, match=r"`m` is text that is no JSON \(.*\); it looks like Python's repr: write it"):
        read_turns("[{'role': 'user', 'content': 'a'}]", "m", "s", Mapping())


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([None], r"s: `tools\[0\]` should be an object with `type` and `function`, and is missing or null"),
        ([{"type": "function"}], r"s: `tools\[0\].name` should be text and is missing or null"),
        ([{"function": {}}], r"s: `tools\[0\].function.name` should be text"),
        ([{"function": []}], r"s: `tools\[0\].function` should be an object with `name`"),
        ([{"name": "f", "parameters": {"x": {1, 2}}}], r"s: `tools\[0\]` should be plain JSON"),
        ([{"name": "f", "description": "\udc00"}], r"s: `tools\[0\]` holds a lone surrogate"),
        ({"name": "f"}, "s: `tools` should be a filled list and is an object"),
        ("[1", "s: `tools` is text that is no JSON"),
    ],
)
def test_broken_tools(tools, message):
    with pytest.raises(InputError, match=message):
        read_tools(tools, "tools", "s")


def test_the_call_that_a_result_answers_reaches_the_template(make_tokenizer):
    from mora_jax.data import Conversation
    from mora_jax.data.templates.render import Renderer

    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% if m['role'] == 'tool' %}{{ ' for ' + m['tool_call_id'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    items = [
        {"role": "user", "content": "a"},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "content": "b"},
    ]
    messages = tuple(read_message(item, "m", "row") for item in items)
    text = Renderer(make_tokenizer("byte_level", template)).render(Conversation(messages)).text
    assert "<|tool|>42 for c1<|im_end|>" in text
