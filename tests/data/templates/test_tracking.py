"""Toy templates, written as Python functions: their layouts, and tracing through those that look into contents."""

from __future__ import annotations

import pytest

from mora_jax.data.templates.tracking import (
    Span,
    TemplateLayout,
    Untrackable,
    find_layout,
    match_layout,
    stand_in,
    trace,
)


def swapped(contents):
    """Shows the second message before the first, with marks around each."""
    first, second = contents
    return f"<{second}>[{first.strip()}]!"


def test_layout_is_what_stands_around_the_messages():
    layout = find_layout(swapped, ["a", "b"], [0, 1], [False, False])
    assert layout == TemplateLayout(("<", ">[", "]!"), (1, 0))
    spans = match_layout(layout, [" a ", " b"], swapped([" a ", " b"]))
    assert spans == [Span(1, 3, 1), Span(5, 6, 0)]


def test_a_message_that_is_kept_belongs_to_the_layout():
    layout = find_layout(swapped, ["", "b"], [0, 1], [True, False])
    assert layout == TemplateLayout(("<", ">[]!"), (1,))


def test_equal_messages_are_told_apart_by_their_order():
    layout = find_layout("|".join, ["a", "a", "b"], [0, 0, 2], [False] * 3)
    assert layout == TemplateLayout(("", "|", "|", ""), (0, 1, 2))


@pytest.mark.parametrize("text", ["<b>[a]", "<b>[a]!!", "<b>[x]!", "<x>[a]!", "", "<b>[ab]!"])
def test_text_that_the_layout_does_not_explain(text):
    layout = find_layout(swapped, ["a", "b"], [0, 1], [False, False])
    assert match_layout(layout, ["a", "b"], text) is None


def test_each_message_may_be_stripped_in_its_own_way():
    contents = ["\n a\n", " b ", "  ", "c "]
    layout = TemplateLayout(("", "\n", "\n", "\n", "."), (0, 1, 2, 3))
    spans = match_layout(layout, contents, "\n a\n\nb\n\nc.")
    assert spans is not None
    assert [("\n a\n\nb\n\nc.")[span.start : span.stop] for span in spans] == ["\n a\n", "b", "", "c"]


def test_stand_ins_are_no_parts_of_each_other():
    words = [stand_in(index) for index in range(120)]
    assert not any(a in b for a in words for b in words if a != b)


def traced(template, contents, program=""):
    """The stretches of the rendering that are a message's, with the message."""
    groups = [contents.index(content) for content in contents]
    text = template(contents)
    return [(text[s.start : s.stop], s.content) for s in trace(template, contents, groups, text, program)]


def without_thoughts(contents):
    return "".join(f"[{content.split('</t>')[-1].strip()}]" for content in contents)


def test_what_is_left_of_each_message():
    assert traced(without_thoughts, ["<t>x</t> y ] z", "w"], "</t>") == [("y ] z", 0), ("w", 1)]


def test_a_message_in_two_parts():
    def parted(contents):
        return " and ".join(part for content in contents for part in content.split("</t>"))

    assert traced(parted, ["one</t>two"], "</t>") == [("one", 0), ("two", 0)]


def test_space_at_the_edges_is_left_to_the_template_and_kept_inside():
    assert traced("\n".join, [" a  b\n", "\nc"]) == [("a  b", 0), ("c", 1)]


def test_equal_messages_one_after_the_other():
    assert traced("".join, ["ab", "c", "ab", "ab"]) == [("ab", 0), ("c", 1), ("ab", 2), ("ab", 3)]


def test_private_characters_in_a_message():
    private = "\U000f0000\U00100000"
    assert traced("-".join, ["a", private]) == [("a", 0), (private, 1)]
    assert traced("-".join, [private, "a"]) == [(private, 0), ("a", 1)]


@pytest.mark.parametrize(
    "template",
    [
        lambda contents: "".join(contents).upper(),
        lambda contents: str("x" in contents[0]),
        lambda contents: "".join(contents)[::-1] if "x" in contents[0] else "".join(contents),
    ],
)
def test_templates_that_cannot_be_followed(template):
    with pytest.raises(Untrackable, match="depends on the words"):
        traced(template, ["xy"])
