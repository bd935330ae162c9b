"""Chat templates of every manner, tracked; random conversations against an oracle that composes the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from mora_jax.data import Conversation, Message, Renderer, Segment, render_prompt
from mora_jax.errors import InputError
from tests.data.encoded import encode

B, T, H, C = Segment.BOS, Segment.TEMPLATE, Segment.HEADER, Segment.CLOSING
S, U, A, E = Segment.SYSTEM, Segment.USER, Segment.ASSISTANT, Segment.END_OF_TURN
OWN = {"system": S, "user": U, "assistant": A}


# Oracles: what each template of conftest.py writes, put together from what its family documents. Each gives
# (text, segment, turn); they share no code with the package and never see a rendering.


def chatml(messages, tokenizer):
    if messages[0].role != "system":
        yield "<|im_start|>system\nYou are helpful.<|im_end|>", T, -1
        yield "\n", H, 0
    for i, m in enumerate(messages):
        yield ("\n" if i else "") + f"<|im_start|>{m.role}\n", H, i
        yield m.content, OWN[m.role], i
        yield "<|im_end|>", E if m.role == "assistant" else C, i
    yield "\n", T, -1


def llama2(messages, tokenizer):
    bos = tokenizer.bos_token or ""
    system = messages[0] if messages[0].role == "system" else None
    yield bos, H if system else T, 0 if system else -1
    for i, m in enumerate(messages):
        if m.role == "system":
            yield "[INST] <<SYS>>\n", H, i
            yield m.content, S, i
        elif m.role == "user":
            yield "\n<</SYS>>\n\n" if system and i == 1 else "[INST] ", H, i
            yield m.content.strip(), U, i
            yield " [/INST]", C, i
        else:
            yield " " + m.content.strip(), A, i
            yield " " + tokenizer.eos_token, E, i


def llama3(messages, tokenizer):
    for i, m in enumerate(messages):
        yield f"<|start_header_id|>{m.role}<|end_header_id|>\n\n", H, i
        yield m.content.strip(), OWN[m.role], i
        yield "<|eot_id|>", E if m.role == "assistant" else C, i


def mistral(messages, tokenizer):
    system = messages[0] if messages[0].role == "system" else None
    last = [m for m in messages if m.role == "user"][-1]
    rest = [(i, m) for i, m in enumerate(messages) if m is not system]
    said = system is not None and rest[0][1] == last
    yield tokenizer.bos_token or "", H if said else T, 0 if said else -1
    for i, m in rest:
        if m.role == "user":
            inside = system is not None and m == last
            yield "[INST] ", H, 0 if inside else i
            if inside:
                yield system.content, S, 0
                yield "\n\n", H, i
            yield m.content, U, i
            yield "[/INST]", C, i
        else:
            yield " " + m.content, A, i
            yield tokenizer.eos_token, E, i


def headers_only(messages, tokenizer):
    for i, m in enumerate(messages):
        yield f"<|{m.role}|>\n", H, i
        yield m.content, OWN[m.role], i
    if messages[-1].role == "assistant":
        yield tokenizer.eos_token, E, len(messages) - 1


ORACLES = {
    "chatml": chatml,
    "llama2": llama2,
    "llama3": llama3,
    "mistral": mistral,
    "headers_only": headers_only,
}

_SNIPPETS = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<s>",
    "</s>",
    "[INST]",
    " [/INST] ",
    "<|user|>",
    "<|eot_id|>",
    "### Response:",
    "{{ messages }}",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "\r\n",
    "\u200d",
    "\u200f\u202eשלום\u202c",
    "👩‍👩‍👧",
    "\ufeff",
    "\u2028",
    "e\u0301",
    "\U000e0041",
    "\U00100000",
    ":",
    '"',
    "12",
    "a",
    "The answer",
]
_letters = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
words = st.lists(st.one_of(st.sampled_from(_SNIPPETS), _letters), max_size=6).map("".join)
_random = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@st.composite
def conversations(draw):
    system = [Message("system", draw(words))] if draw(st.booleans()) else []
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Message("user", draw(words)), Message("assistant", draw(words))]
    if draw(st.integers(0, 4)) == 0:
        turns.pop()
    return tuple(system + turns)


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_trimmed", "metaspace", "word_piece"])
@pytest.mark.parametrize("chat", ORACLES)
@_random
@given(messages=conversations())
def test_against_the_oracle(kind, chat, make_tokenizer, messages):
    tokenizer = make_tokenizer(kind, chat)
    expected = list(ORACLES[chat](list(messages), tokenizer))
    characters = [(segment, turn) for text, segment, turn in expected for _ in text]
    rendered = Renderer(tokenizer).render(Conversation(messages))
    assert rendered.text == "".join(text for text, _, _ in expected)
    found = [(piece.segment, piece.turn) for piece in rendered.pieces for _ in piece.text]
    differing = [i for i, (a, b) in enumerate(zip(found, characters, strict=True)) if a != b]
    assert not differing, [(rendered.text[i], found[i], characters[i]) for i in differing]
    characters = [segment for segment, _ in characters]
    [example] = encode([Conversation(messages)], tokenizer)
    check_tokens(example, rendered.text, characters, tokenizer)


def check_tokens(example, text, characters, tokenizer):
    """A token's segment is that of one of its characters; all visible characters of answers have weight 1."""
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    extra = len(example) - len(plain["input_ids"])
    assert extra in (0, 1)
    assert example.input_ids[extra:].tolist() == plain["input_ids"]
    for t, (start, stop) in enumerate(plain["offset_mapping"]):
        segment, weight = Segment(example.segments[t + extra]), example.weights[t + extra]
        if (segment == Segment.BOS and t == 0) or start == stop:
            continue
        inside = characters[start:stop]
        assert segment in inside
        visible = {s for s, c in zip(inside, text[start:stop], strict=True) if not c.isspace()}
        if t + extra > 0:
            assert weight == (1 if segment in (A, E) else 0)
            if A in visible or E in visible:
                assert weight == 1
            elif visible:
                assert weight == 0


@pytest.mark.parametrize("chat", [*ORACLES, "gemma", "thinking"])
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_prompt_is_the_beginning_of_the_training_text(chat, kind, make_tokenizer):
    if (kind, chat) == ("byte_level", "llama3"):
        chat = "chatml"  # This tokenizer splits "\\n\\n" in two where a word follows: see the next test.
    tokenizer = make_tokenizer(kind, chat)
    asked = (Message("user", "Name it."), Message("assistant", "Yes."), Message("user", "And 12?"))
    row = Conversation((*asked, Message("assistant", "42")))
    [example] = encode([row], tokenizer)
    prompt = render_prompt(tokenizer, asked)
    np.testing.assert_array_equal(example.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert example.weights[len(prompt.input_ids)] == 1
    assert example.weights[len(prompt.input_ids) - 1] == 0


def test_a_prompt_whose_end_is_split_otherwise_is_reported(make_tokenizer):
    [note] = Renderer(make_tokenizer("byte_level", "llama3")).notes
    assert "splits the end of a prompt" in note
    assert Renderer(make_tokenizer("byte_level", "chatml")).notes == []


def test_reasoning_that_the_template_cuts_out_of_earlier_answers(make_tokenizer):
    tokenizer = make_tokenizer("byte_level", "thinking")
    thought = "<think>\nHm, <b>12</b>.\n</think>\n\nYes. "
    messages = (
        Message("user", "a"),
        Message("assistant", thought),
        Message("user", ""),
        Message("assistant", thought),
    )
    rendered = Renderer(tokenizer).render(Conversation(messages))
    assert [(piece.text, piece.segment, piece.turn) for piece in rendered.pieces] == [
        ("<|im_start|>user\n", H, 0),
        ("a", U, 0),
        ("<|im_end|>", C, 0),
        ("\n<|im_start|>assistant\n", H, 1),
        ("Yes.", A, 1),
        (" <|im_end|>", E, 1),
        ("\n<|im_start|>assistant\n", H, 3),
        ("<think>\nHm, <b>12</b>.\n</think>\n\nYes.", A, 3),
        (" <|im_end|>", E, 3),
        ("\n", T, -1),
    ]
    told = "the chat template leaves the reasoning of earlier answers out: only the last is trained on it"
    assert told in Renderer(tokenizer).notes
    assert Renderer(make_tokenizer("byte_level", "chatml")).notes == []


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@_random
@given(messages=conversations())
def test_thinking_template_never_trains_what_is_not_an_answers(kind, make_tokenizer, messages):
    tokenizer = make_tokenizer(kind, "thinking")
    rendered = Renderer(tokenizer).render(Conversation(messages))
    answers = "".join(m.content for m in messages if m.role == "assistant")
    asked = "".join(m.content for m in messages if m.role != "assistant")
    for piece in rendered.pieces:
        assert piece.segment != A or piece.text.strip() in answers
        assert piece.segment not in (U, S) or piece.text.strip() in asked


def test_text_of_the_template_that_looks_like_the_rest_of_a_cut_is_left_to_it(make_tokenizer):
    """The ">" of the header is not that of the "</think>" which the template cut away."""
    chat = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] }}"
        "{{ '<|eot_id|>' }}{% endfor %}"
    )
    messages = (Message("user", "a"), Message("assistant", "<think>b</think>c"))
    rendered = Renderer(make_tokenizer("byte_level", chat)).render(Conversation(messages))
    assert [(piece.text, piece.segment) for piece in rendered.pieces] == [
        ("<|user|>", H),
        ("a", U),
        ("<|eot_id|>", C),
        ("<|assistant|>", H),
        ("c", A),
        ("<|eot_id|>", E),
    ]


def test_tags_are_found_beside_those_that_the_template_cuts(make_tokenizer):
    tokenizer = make_tokenizer("byte_level", "thinking")
    turns = [("user", "a"), ("assistant", "<b>x</think><i>"), ("user", "c"), ("assistant", "<b></b>")]
    rendered = Renderer(tokenizer).render(Conversation(tuple(Message(*turn) for turn in turns)))
    assert [piece.text for piece in rendered.pieces if piece.segment == A] == ["<i>", "<b></b>"]


def test_a_very_long_answer_is_followed_to_the_character(make_tokenizer):
    long = "wörd 日本 <b>" * 30_000
    turns = [("user", "a"), ("assistant", f"<think>x</think>\n\n{long}"), ("user", "b"), ("assistant", "c")]
    tokenizer = make_tokenizer("byte_level", "thinking")
    rendered = Renderer(tokenizer).render(Conversation(tuple(Message(*turn) for turn in turns)))
    assert [piece.text for piece in rendered.pieces if piece.segment == A] == [long, "c"]


def test_earlier_answers_that_end_otherwise_than_the_last(make_tokenizer):
    chat = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{{ '<|endoftext|>' if loop.last else '<|eot_id|>' }}{% endfor %}"
    )
    messages = tuple(Message(role, role[0]) for role in ("user", "assistant") * 2)
    rendered = Renderer(make_tokenizer("byte_level", chat)).render(Conversation(messages))
    assert [p.text for p in rendered.pieces if p.segment == E] == ["<|eot_id|>", "<|endoftext|>"]


def test_a_template_that_demands_a_system_message_or_takes_one_question(make_tokenizer):
    chat = (
        "{% if messages[0]['role'] != 'system' or messages | length > 3 %}"
        "{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] + '<|eot_id|>' }}{% endfor %}"
    )
    renderer = Renderer(make_tokenizer("byte_level", chat))
    messages = tuple(Message(role, role[0]) for role in ("system", "user", "assistant"))
    rendered = renderer.render(Conversation(messages))
    assert [p.text for p in rendered.pieces if p.segment == E] == ["<|eot_id|>"]
    with pytest.raises(InputError, match="refuses the roles user, assistant: no"):
        renderer.render(Conversation(messages[1:]))


def test_a_blank_answer_still_ends(make_tokenizer):
    tokenizer = make_tokenizer("byte_level", "chatml")
    rendered = Renderer(tokenizer).render(Conversation((Message("user", "a"), Message("assistant", ""))))
    assert [piece.text for piece in rendered.pieces if piece.segment == E] == ["<|im_end|>"]


def test_empty_system_is_kept_as_the_template_has_it(make_tokenizer):
    tokenizer = make_tokenizer("byte_level", "chatml")
    messages = (Message("system", ""), Message("user", "a"), Message("assistant", "b"))
    rendered = Renderer(tokenizer).render(Conversation(messages))
    assert rendered.text.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\na<|im_end|>")
    assert S not in {piece.segment for piece in rendered.pieces}


def test_a_thousand_turns_each_stripped_in_another_way(make_tokenizer):
    chat = (
        "{% for m in messages %}{{ m['role'] + ':' }}{% if loop.index is odd %}{{ m['content'] | trim }}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    )
    messages = tuple(Message(("user", "assistant")[i % 2], f" {i} ") for i in range(1000))
    rendered = Renderer(make_tokenizer("byte_level", chat)).render(Conversation(messages))
    assert [piece.text for piece in rendered.pieces if piece.segment == U][:2] == ["0", "2"]
    assert [piece.text for piece in rendered.pieces if piece.segment == A][:2] == [" 1 ", " 3 "]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("{{ m['content'] | upper }}", "row 3: .*cannot be tracked"),
        ("{{ m['content'] | length }}", "does not show the words of message 2"),
        ("{{ m['content'] * 2 }}", "repeats message 2"),
        ("{{ m['content'] }", "syntax error"),
        ("{{ raise_exception('no') }}", "refuses"),
        ("{{ m['content'] + m['wrong'] }}", "refuses"),
    ],
)
def test_templates_that_cannot_be_used(chat, message, make_tokenizer):
    tokenizer = make_tokenizer("byte_level", "{% for m in messages %}" + chat + "{% endfor %}")
    row = Conversation((Message("user", "Who?"), Message("assistant", "You!")), source="row 3")
    with pytest.raises(InputError, match=message):
        Renderer(tokenizer).render(row)


def test_roles_that_a_template_refuses_are_named(make_tokenizer):
    tokenizer = make_tokenizer("metaspace", "gemma")
    row = Conversation(
        (Message("system", "s"), Message("user", "u"), Message("assistant", "a")), source="f.json, row 7"
    )
    with pytest.raises(InputError, match=r"f\.json, row 7: .*refuses .*System role not supported"):
        Renderer(tokenizer).render(row)


def test_a_template_that_writes_the_time_is_tracked_again(make_tokenizer):
    chat = "{}{{% for m in messages %}}{{{{ m['content'] + '<|im_end|>' }}}}{{% endfor %}}"
    tokenizer = make_tokenizer("byte_level", chat.format("9:59 "))
    renderer = Renderer(tokenizer)
    row = Conversation((Message("user", "a"), Message("assistant", "b")))
    assert renderer.render(row).text == "9:59 a<|im_end|>b<|im_end|>"
    tokenizer.chat_template = chat.format("10:00 ")
    rendered = renderer.render(row)
    assert rendered.text == "10:00 a<|im_end|>b<|im_end|>"
    assert [piece.segment for piece in rendered.pieces] == [H, U, C, A, E]
