"""Random conversations under every template, against an oracle that renders again and again.

It finds the words of a message by putting a mark in their place, what the model has to produce by rendering only
the beginning of the conversation, and tokens by the bytes they decode to. It looks at texts alone: neither at
pieces nor at offsets.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st
from tokenizers import pre_tokenizers

from mora_jax.data import TEMPLATES, Conversation, Message, Renderer, Segment, tokenize
from tests.data.conftest import CHAT_TEMPLATES

_MARK = "\U000fabcd"
_MARKERS = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|user|>",
    "<|assistant|>\n",
    "<|eot_id|>",
    "<|endoftext|>",
    "</s>",
    "[INST]",
    " [/INST] ",
    "<</SYS>>",
    "### Response:",
    "<end_of_turn>\n",
    "{{ messages }}",
    "{% endfor %}",
]
_PLAIN = ["\n", "\n\n", " ", "  ", "\t", "\r\n", "\u00a0", "\u2028", "a", "The answer", ":", '"', "12", "."]
_STRANGE = [
    "\u200d",
    "\u200f\u202eשלום\u202c",
    "👩‍👩‍👧",
    "\ufeff",
    "e\u0301",
    "\U000e0041",
    "\U00100000",
    "\x00",
    "日本",
    "🏴",
]
_letters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=_MARK), max_size=3)
_words = st.lists(
    st.one_of(st.sampled_from(_MARKERS), st.sampled_from(_PLAIN), st.sampled_from(_STRANGE), _letters), max_size=5
).map("".join)

#: Templates of a tokenizer that only put contents into their places, and whether they take a system message there.
PLACING = {"chatml": True, "llama2": True, "llama3": True, "gemma": False, "mistral": False, "headers_only": True}
CASES = [(None, chat, system) for chat, system in PLACING.items()]
CASES += [(template, None, True) for template in TEMPLATES]


@st.composite
def conversations(draw):
    turns = [Message("system", draw(_words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Message("user", draw(_words)), Message("assistant", draw(_words))]
    return tuple(turns)


def with_content(messages, index, content):
    return (*messages[:index], Message(messages[index].role, content), *messages[index + 1 :])


def spans_by_marks(render, messages, text):
    """Where the words of each message stand: what a mark in their place leaves of the text on both sides."""
    for i in range(len(messages)):
        marked = render(with_content(messages, i, _MARK))
        before, mark, after = marked.partition(_MARK)
        assert mark and text.startswith(before) and text.endswith(after)
        yield len(before), len(text) - len(after)


def trained_by_prefixes(render, prompt, messages, spans, text):
    """Which characters the model has to produce: from where a prompt ends to where the answered one does."""
    trained = np.zeros(len(text), bool)
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        asked, answered = prompt(messages[:i]), render(messages[: i + 1])
        assert text.startswith(asked)
        stop = spans[i][1]
        closed = answered[stop:].rstrip()  # Space after the end of a turn is the next one's.
        # The end may be one that is written after the last answer alone.
        end = stop + len(closed) if text.startswith(closed, stop) else stop
        trained[len(asked) : end] = True
    return trained


# The alphabet of byte-level tokenizers: printable bytes stand for themselves, the rest follow from 256 on.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def bytes_of(tokenizer, input_ids):
    """How many bytes each token decodes to."""
    added = {index: text for text, index in tokenizer.get_added_vocab().items()}
    return [
        len(added[i].encode()) if i in added else len(bytes(_BYTE_OF[c] for c in tokenizer.convert_ids_to_tokens(i)))
        for i in input_ids
    ]


def test_the_alphabet_is_the_one_of_byte_level_tokenizers():
    assert set(_BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize(("template", "chat", "system"), CASES)
@pytest.mark.parametrize("kind", ["byte_level", "byte_level_trimmed"])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(
    messages=(Message("user", "\u2028"), Message("assistant", "\n\n:"), Message("user", ""), Message("assistant", ""))
)
@given(messages=conversations())
def test_masks_against_rendering_again_and_again(kind, template, chat, system, make_tokenizer, messages):
    if not system and messages[0].role == "system":
        messages = messages[1:]
    assume(len(set(messages)) == len(messages))  # A mark in one of two equal messages makes them differ.
    if template == "llama2" and messages[0].role == "system":
        assume(messages[1].content.strip())  # It strips what stands in the brackets as a whole.
    tokenizer = make_tokenizer(kind, chat)
    renderer = Renderer(tokenizer, template)

    def render(messages):
        return renderer.render(Conversation(messages)).text

    rendered = renderer.render(Conversation(messages))
    text = rendered.text
    spans = list(spans_by_marks(render, messages, text))
    trained = trained_by_prefixes(render, renderer.prompt, messages, spans, text)
    check_words(rendered, messages, spans, trained)
    [tokens] = tokenize([rendered], tokenizer)
    sizes = bytes_of(tokenizer, tokens.input_ids.tolist())
    assert sum(sizes) == len(text.encode())
    character_of = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])
    found = np.isin(tokens.segments, (Segment.ASSISTANT, Segment.END_OF_TURN))
    at = 0
    for is_trained, size in zip(found, sizes, strict=True):
        inside = character_of[at : at + size]
        at += size
        if trained[inside].all() or not trained[inside].any():
            assert is_trained == trained[inside][0]
        else:  # A token over a border is trained where it shows any of the answer.
            visible = [i for i in inside if not text[i].isspace()]
            assert is_trained == trained[visible or inside].any()


def check_words(rendered, messages, spans, trained):
    """The same, character by character, for pieces."""
    at = 0
    for piece in rendered.pieces:
        stop = at + len(piece.text)
        produced = piece.segment in (Segment.ASSISTANT, Segment.END_OF_TURN)
        assert (trained[at:stop] == produced).all(), piece
        if piece.segment in (Segment.SYSTEM, Segment.USER):
            assert spans[piece.turn] == (at, stop)
            assert messages[piece.turn].role == piece.segment.name.lower()
        at = stop


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_a_row_of_one_megabyte(kind, make_tokenizer):
    words = "日本 \u200dשלום\u202e👩‍👩‍👧 <|im_end|> a  \U00100000" * 25_000
    row = Conversation((Message("user", words), Message("assistant", words)))
    assert len(words.encode()) > 10**6
    tokenizer = make_tokenizer(kind, "chatml")
    rendered = Renderer(tokenizer).render(row)
    assert [piece.text for piece in rendered.pieces if piece.segment == Segment.ASSISTANT] == [words]
    [tokens] = tokenize([rendered], tokenizer)
    said = [np.flatnonzero(tokens.segments == segment) for segment in (Segment.USER, Segment.ASSISTANT)]
    ids = [tokens.input_ids[where[0] : where[-1] + 1] for where in said]
    assert [len(where) for where in said] == [len(one) for one in ids]
    np.testing.assert_array_equal(*ids)


def test_every_other_template_is_tested_elsewhere():
    assert set(CHAT_TEMPLATES) - set(PLACING) == {"thinking"}  # It looks into what it is given.
