"""Tracing through toy templates, written as Python functions, that look into what they are given."""

from __future__ import annotations

import pytest

from mora_jax.data.templates.tracking import Untrackable, trace


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
