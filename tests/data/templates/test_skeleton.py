"""Layouts of toy templates, written as Python functions."""

from __future__ import annotations

import pytest

from mora_jax.data.templates.tracking import Span, TemplateLayout, find_layout, match_layout, stand_in


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
