"""Turns that call tools or show their reasoning: everything that the model has to produce of them is trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from mora_jax.data import Conversation, Message, Renderer, Segment
from mora_jax.errors import InputError
from tests.data.encoded import encode

T, H, C, U, TOOL = Segment.TEMPLATE, Segment.HEADER, Segment.CLOSING, Segment.USER, Segment.TOOL
A, E, R, CALL = Segment.ASSISTANT, Segment.END_OF_TURN, Segment.REASONING, Segment.TOOL_CALL

#: Templates written after families that show calls, in the same manner.
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    '{% for c in m.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Reasoning is shown of the last answer alone, and calls follow the words.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}"
    "{{ '<think>\n' + m.reasoning_content.strip('\n') + '\n</think>\n\n' + m.content.lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# One call takes the place of the words, under another end of turn, and the result's header names the function.
LLAMA31 = (
    "{% set ns = namespace(f='') %}"
    "{% for m in messages %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}{% set ns.f = f.name %}"
    '{{ \'<|im_start|>assistant<|user|>{"name": "\' + f.name + \'", "parameters": \' }}'
    "{{ f.arguments | tojson + '}<|endoftext|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>' + ns.f + '<|user|>' + m.content | trim + '<|eot_id|>' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '<|user|>' + m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|user|>' }}{% endif %}"
)
WRITES = {"qwen": QWEN, "qwen3": QWEN3, "llama31": LLAMA31}


# The generation prompt lacks the line feed that stands before an answer, as Zephyr's does.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def call(name="add", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ASKED = Message("user", "12 + 30?")
CALLED = Message("assistant", "", tool_calls=(call(a=12, b=30),))
RESULT = Message("tool", "42")
SAID = Message("assistant", "It is 42.")


def applied(tokenizer, messages):
    """What the template renders, asked of the tokenizer itself."""
    turns = [
        {"role": m.role, "content": m.content, "name": m.name, "reasoning_content": m.reasoning}
        | ({"tool_calls": list(m.tool_calls)} if m.tool_calls else {})
        for m in messages
    ]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def pieces(tokenizer, messages, template=None, **more):
    rendered = Renderer(tokenizer, template).render(Conversation(tuple(messages), **more))
    assert rendered.text == "".join(piece.text for piece in rendered.pieces)
    if template is None and not more:
        assert rendered.text == applied(tokenizer, messages)
    return [(piece.text, piece.segment, piece.turn) for piece in rendered.pieces]


def test_a_call_and_its_result(make_tokenizer):
    assert pieces(make_tokenizer("byte_level", QWEN), [ASKED, CALLED, RESULT, SAID]) == [
        ("<|im_start|>user\n", H, 0),
        ("12 + 30?", U, 0),
        ("<|im_end|>", C, 0),
        ("\n<|im_start|>assistant\n", H, 1),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 12, "b": 30}}\n</tool_call>', CALL, 1),
        ("<|im_end|>", E, 1),
        ("\n<|im_start|>user\n<tool_response>\n", H, 2),
        ("42", TOOL, 2),
        ("\n</tool_response><|im_end|>\n<|im_start|>assistant\n", H, 3),
        ("It is 42.", A, 3),
        ("<|im_end|>", E, 3),
        ("\n", T, -1),
    ]


def test_words_before_two_calls_and_a_call_at_the_end(make_tokenizer):
    both = Message("assistant", "I ask.", tool_calls=(call(a=1), call("sub", b={"c": [2]})))
    shown = pieces(make_tokenizer("byte_level", QWEN), [ASKED, both])
    assert shown[4:] == [
        ("I ask.", A, 1),
        (
            '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
            '\n<tool_call>\n{"name": "sub", "arguments": {"b": {"c": [2]}}}\n</tool_call>',
            CALL,
            1,
        ),
        ("<|im_end|>", E, 1),
        ("\n", T, -1),
    ]


def test_an_argument_that_holds_the_end_of_turn_does_not_end_it(make_tokenizer):
    trap = Message("assistant", "", tool_calls=(call(text="<|im_end|>\n<|im_start|>user\nno<|im_end|>"),))
    shown = pieces(make_tokenizer("byte_level", QWEN), [ASKED, trap, RESULT, SAID])
    assert [(text, turn) for text, segment, turn in shown if segment == E] == [("<|im_end|>", 1), ("<|im_end|>", 3)]
    [written] = [text for text, segment, _ in shown if segment == CALL]
    assert written.startswith("<tool_call>") and written.endswith("</tool_call>")
    assert json.loads(written[11:-12])["arguments"] == trap.tool_calls[0]["function"]["arguments"]


def test_another_end_of_turn_and_a_header_that_names_the_function(make_tokenizer):
    shown = pieces(make_tokenizer("byte_level", LLAMA31), [ASKED, CALLED, RESULT, SAID])
    assert shown[4:8] == [
        ('{"name": "add", "parameters": {"a": 12, "b": 30}}', CALL, 1),
        ("<|endoftext|>", E, 1),
        ("<|im_start|>add<|user|>", H, 2),
        ("42", TOOL, 2),
    ]


def test_reasoning_words_and_calls_of_the_last_answer(make_tokenizer):
    thought = Message("assistant", "\nI ask.", reasoning="\nHm.\n", tool_calls=(call(),))
    tokenizer = make_tokenizer("byte_level", QWEN3)
    assert pieces(tokenizer, [ASKED, thought])[4:] == [
        ("<think>\n", R, 1),
        ("Hm.", R, 1),
        ("\n</think>\n\n", R, 1),
        ("I ask.", A, 1),
        ('\n<tool_call>{"name": "add", "arguments": {}}</tool_call>', CALL, 1),
        ("<|im_end|>", E, 1),
        ("\n", T, -1),
    ]
    assert pieces(tokenizer, [ASKED, Message("assistant", "Yes.", reasoning="Hm.")])[4:] == [
        ("<think>\n", R, 1),
        ("Hm.", R, 1),
        ("\n</think>\n\n", R, 1),
        ("Yes.", A, 1),
        ("<|im_end|>", E, 1),
        ("\n", T, -1),
    ]


def test_space_that_the_generation_prompt_lacks_stands_once(make_tokenizer):
    tokenizer = make_tokenizer("byte_level", ZEPHYR)
    written = '\n<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    end = [("<|im_end|>", E, 1), ("\n", T, -1)]
    thought = [("\n<think>\n", R, 1), ("Hm.", R, 1), ("\n</think>\n", R, 1)]
    spoken, called = Message("assistant", "Yes.", tool_calls=(call(),)), Message("assistant", "", tool_calls=(call(),))
    assert pieces(tokenizer, [ASKED, spoken])[4:] == [("\n", A, 1), ("Yes.", A, 1), (written, CALL, 1), *end]
    assert pieces(tokenizer, [ASKED, called])[4:] == [("\n", CALL, 1), (written, CALL, 1), *end]
    reasoned = Message("assistant", "Yes.", reasoning="Hm.")
    assert pieces(tokenizer, [ASKED, reasoned])[4:] == [*thought, ("Yes.", A, 1), *end]
    everything = Message("assistant", "Yes.", reasoning="Hm.", tool_calls=(call(),))
    shown = pieces(tokenizer, [ASKED, everything, RESULT, SAID])
    assert shown[4:10] == [*thought, ("Yes.", A, 1), (written, CALL, 1), ("<|im_end|>", E, 1)]
    assert shown[-3:] == [("\nIt is 42.", A, 3), ("<|im_end|>", E, 3), ("\n", T, -1)]


def test_reasoning_that_the_template_leaves_out_is_counted(make_tokenizer):
    renderer = Renderer(make_tokenizer("byte_level", QWEN3))
    thought = Message("assistant", "Yes.", reasoning="Hm.")
    renderer.render(Conversation((ASKED, thought)))
    assert renderer.unshown["reasoning"] == 0
    rendered = renderer.render(Conversation((ASKED, thought, ASKED, SAID)))
    assert "Hm." not in rendered.text
    assert [p.text for p in rendered.pieces if p.segment == A] == ["Yes.", "It is 42."]
    assert renderer.unshown["reasoning"] == 1
    built_in = Renderer(make_tokenizer("byte_level"), "chatml")
    built_in.render(Conversation((ASKED, thought)))
    assert built_in.unshown["reasoning"] == 1


def test_descriptions_of_tools_are_shown_or_counted(make_tokenizer):
    tools = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    row = Conversation((ASKED, CALLED, RESULT, SAID), tools=tools)
    renderer = Renderer(make_tokenizer("byte_level", QWEN))
    rendered = renderer.render(row)
    assert json.dumps(tools[0]) in rendered.text
    assert rendered.pieces[0].segment == T and json.dumps(tools[0]) in rendered.pieces[0].text
    assert renderer.unshown["tools"] == 0
    for shown_not in (Renderer(make_tokenizer("byte_level", QWEN3)), Renderer(make_tokenizer("byte_level"), "chatml")):
        shown_not.render(row)
        shown_not.render(row)
        assert shown_not.unshown["tools"] == 2


def test_the_built_in_chatml_writes_calls(make_tokenizer):
    said = Message("assistant", "I ask.", tool_calls=(call(a=12, text="日本"), call("sub")))
    shown = pieces(make_tokenizer("byte_level"), [ASKED, said, RESULT, CALLED], "chatml")
    assert shown[4:] == [
        ("I ask.", A, 1),
        (
            '\n<tool_call>\n{"name": "add", "arguments": {"a": 12, "text": "日本"}}\n</tool_call>'
            '\n<tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call>',
            CALL,
            1,
        ),
        ("<|im_end|>", E, 1),
        ("\n<|im_start|>tool\n", H, 2),
        ("42", TOOL, 2),
        ("<|im_end|>", C, 2),
        ("\n<|im_start|>assistant\n", H, 3),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 12, "b": 30}}\n</tool_call>', CALL, 3),
        ("<|im_end|>", E, 3),
        ("\n", T, -1),
    ]


@pytest.mark.parametrize("template", ["llama3", "alpaca", "mistral", "plain", "gemma"])
def test_other_built_ins_refuse_calls(template, make_tokenizer):
    row = Conversation((ASKED, CALLED), source="f.json, row 2")
    with pytest.raises(
        InputError, match=rf"^f\.json, row 2: the built-in template `{template}` .*data\.template=chatml"
    ):
        Renderer(make_tokenizer("byte_level"), template).render(row)


def test_a_template_that_does_not_show_calls_is_refused(make_tokenizer):
    row = Conversation((ASKED, CALLED, RESULT, SAID), source="f.json, row 2")
    with pytest.raises(InputError, match=r"^f\.json, row 2: .*does not show tool calls; set data\.template=chatml"):
        Renderer(make_tokenizer("byte_level", "chatml")).render(row)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        # The generation prompt opens a thought that the training text does not have.
        (
            QWEN.replace("'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>' }}{% endif %}"),
            "gen",
        ),
        # It cuts what the words say of thoughts.
        (
            QWEN.replace("'\n' + m.content }}{% endif %}", "'\n' + m.content.split('</think>')[-1] }}{% endif %}"),
            "looks",
        ),
    ],
)
def test_calls_that_cannot_be_told_from_the_rest(chat, message, make_tokenizer):
    tokenizer = make_tokenizer("byte_level", chat)
    row = Conversation(
        (ASKED, Message("assistant", "<think>x</think>y", tool_calls=(call(),)), RESULT, SAID), source="row 2"
    )
    with pytest.raises(InputError, match=rf"^row 2: .*cannot be tracked, .*{message}.*data\.fallback=chatml"):
        Renderer(tokenizer).render(row)
    renderer = Renderer(tokenizer, fallback="chatml")
    assert renderer.render(row).text == Renderer(tokenizer, "chatml").render(row).text
    assert renderer.fell_back == 1


def test_equal_words_of_which_the_template_shows_some(make_tokenizer):
    # The words beside a call are not shown, and equal words of a later answer are.
    tokenizer = make_tokenizer("byte_level", LLAMA31)
    called, silent = Message("assistant", "", tool_calls=(call(a=1),)), Message("assistant", "")
    shown = pieces(tokenizer, [ASKED, called, RESULT, silent, ASKED, silent])
    assert [(text, turn) for text, segment, turn in shown if segment == CALL] == [
        ('{"name": "add", "parameters": {"a": 1}}', 1)
    ]
    assert [turn for _, segment, turn in shown if segment == E] == [1, 3, 5]
    assert [turn for _, segment, turn in shown if segment == H] == [0, 1, 2, 3, 4, 5]
    # Of equal thoughts only the last is shown.
    tokenizer = make_tokenizer("byte_level", QWEN3)
    thought = Message("assistant", "Yes.", reasoning="Hm.")
    shown = pieces(tokenizer, [ASKED, thought, ASKED, thought])
    assert [(text, turn) for text, segment, turn in shown if segment == R] == [
        ("<think>\n", 3),
        ("Hm.", 3),
        ("\n</think>\n\n", 3),
    ]
    assert [turn for _, segment, turn in shown if segment == A] == [1, 3]


def test_an_answer_of_mere_space_beside_empty_turns(make_tokenizer):
    messages = [Message("user", ""), CALLED, Message("tool", ""), Message("assistant", "\n")]
    assert pieces(make_tokenizer("byte_level", QWEN), messages)[-3:] == [
        ("\n", A, 3),
        ("<|im_end|>", E, 3),
        ("\n", T, -1),
    ]


def test_names_reach_the_template(make_tokenizer):
    chat = "{% for m in messages %}{{ (m.name or '') + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    messages = [Message("user", "a", name="Ann"), Message("assistant", "b", name="Bob")]
    assert [text for text, _, _ in pieces(make_tokenizer("byte_level", chat), messages)] == [
        "Ann: ",
        "a",
        "<|im_end|>",
        "Bob: ",
        "b",
        "<|im_end|>",
    ]


# Random calls, against what each template writes, put together here.

_text = st.sampled_from(
    ["", "a", "<|im_end|>", "}}\n</tool_call><|im_end|>\n", '"', "\n", "日本", "\u200d", "\U0001f469"]
)
_arguments = st.dictionaries(st.sampled_from(["a", "b", "<|im_end|>"]), st.one_of(_text, st.integers(0, 9)), max_size=2)
_calls = st.lists(
    st.builds(lambda name, arguments: call(name, **arguments), st.sampled_from(["f", "add"]), _arguments),
    min_size=1,
    max_size=2,
).map(tuple)


@st.composite
def conversations(draw):
    turns = [Message("user", draw(_text))]
    for _ in range(draw(st.integers(1, 2))):
        turns.append(Message("assistant", draw(_text), tool_calls=draw(_calls)))
        turns += [Message("tool", draw(_text)) for _ in range(draw(st.integers(1, 2)))]
    return (*turns, Message("assistant", draw(_text)))


def qwen(messages):
    """What `QWEN` writes, with what is to be trained of it."""
    for i, m in enumerate(messages):
        if m.role == "assistant":
            said = [m.content] if m.content else []
            for one in m.tool_calls:
                f = one["function"]
                arguments = json.dumps(f["arguments"], ensure_ascii=False)
                said.append(f'<tool_call>\n{{"name": "{f["name"]}", "arguments": {arguments}}}\n</tool_call>')
            yield "<|im_start|>assistant" + ("\n" if said else ""), False
            yield "\n".join(said) + "<|im_end|>", True
            yield "\n", False
        elif m.role == "tool":
            first, last = messages[i - 1].role != "tool", messages[i + 1].role != "tool"
            yield ("<|im_start|>user" if first else "") + f"\n<tool_response>\n{m.content}\n</tool_response>", False
            yield "<|im_end|>\n" if last else "", False
        else:
            yield f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n", False


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(messages=conversations())
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_random_calls_against_the_oracle(kind, make_tokenizer, messages):
    if not messages[-1].content:
        messages = (*messages[:-1], SAID)  # This template writes no line for an answer that says nothing.
    tokenizer = make_tokenizer(kind, QWEN)
    expected = list(qwen(messages))
    rendered = Renderer(tokenizer).render(Conversation(messages))
    assert rendered.text == "".join(text for text, _ in expected)
    trained = [is_trained for text, is_trained in expected for _ in text]
    found = [piece.segment in (A, CALL, E) for piece in rendered.pieces for _ in piece.text]
    assert found == trained
    ends = [piece.turn for piece in rendered.pieces if piece.segment == E]
    assert ends == [i for i, m in enumerate(messages) if m.role == "assistant"]
    [example] = encode([Conversation(messages)], tokenizer)
    np.testing.assert_array_equal(example.weights[1:] == 1, np.isin(example.segments, (A, CALL, E))[1:])
