"""The first way to locate messages in a rendering: the template's own text around stand-ins.

Every content is replaced by a unique word. What stands between these words is the template's own text, the
layout. A real rendering must equal the layout with the real contents, plain or stripped, in place of the
words, character for character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mora_jax.data.templates.spans import RenderContents, Span


@dataclass(frozen=True)
class TemplateLayout:
    """What a template writes around the contents.

    Attributes:
      literals: the template's text before each content and after the last; one more than `order`.
      order: which content each gap between literals holds.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]


_STRIPS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)


def stand_in(index: int) -> str:
    """A word that no template holds, with nothing in it that a template could strip or look for."""
    return f"Qz{index}xMessage{index}xzQ"


_STAND_IN = re.compile(r"Qz(\d+)xMessage\1xzQ")


def find_layout(
    render: RenderContents, contents: Sequence[str], groups: Sequence[int], keep: Sequence[bool]
) -> TemplateLayout:
    """Renders stand-ins and reads the template's own text around them.

    Args:
      render: runs the template.
      contents: the real contents.
      groups: for each message the first one that equals it. Equal messages get equal stand-ins, because
        templates compare messages ("is this the last question?").
      keep: for each message, whether its real content is rendered instead of a stand-in (and not located).
    """
    text = render([contents[i] if keep[i] else stand_in(group) for i, group in enumerate(groups)])
    parts = _STAND_IN.split(text)
    return TemplateLayout(tuple(parts[::2]), tuple(_members(map(int, parts[1::2]), groups)))


def _members(seen: Iterable[int], groups: Sequence[int]) -> Iterator[int]:
    """Which of the equal messages each sighting of a group is: one after the other."""
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    for group in seen:
        yield members[group].pop(0) if len(members[group]) > 1 else members[group][0]


def match_layout(layout: TemplateLayout, contents: Sequence[str], text: str) -> list[Span] | None:
    """The spans of the contents if the text is the layout filled with them, else None."""
    for strip in _STRIPS[:2]:
        spans = _fill(layout, [strip(content) for content in contents], text)
        if spans is not None:
            return spans
    return _fill_mixed(layout, contents, text)


def _fill(layout: TemplateLayout, contents: Sequence[str], text: str) -> list[Span] | None:
    spans, at = [], 0
    for literal, message in zip(layout.literals, layout.order, strict=False):
        at += len(literal)
        spans.append(Span(at, at + len(contents[message]), message))
        at += len(contents[message])
    if at + len(layout.literals[-1]) != len(text):
        return None
    parts = [layout.literals[0]]
    for literal, message in zip(layout.literals[1:], layout.order, strict=True):
        parts += (contents[message], literal)
    return spans if "".join(parts) == text else None


def _fill_mixed(layout: TemplateLayout, contents: Sequence[str], text: str) -> list[Span] | None:
    """As `_fill`, where each message may be stripped in its own way: a walk over the few ways that fit."""
    literals, order = layout.literals, layout.order
    if not text.startswith(literals[0]):
        return None

    def steps(gap: int, at: int) -> Iterator[Span]:
        content = contents[order[gap]]
        for words in dict.fromkeys(strip(content) for strip in _STRIPS):
            stop = at + len(words)
            if text.startswith(words, at) and text.startswith(literals[gap + 1], stop):
                yield Span(at, stop, order[gap])

    spans: list[Span] = []
    pending = [steps(0, len(literals[0]))] if order else []
    dead: set[tuple[int, int]] = set()
    while pending:
        span = next(pending[-1], None)
        if span is None:
            pending.pop()
            if spans:
                spans.pop()
            continue
        gap, at = len(pending), span.stop + len(literals[len(pending)])
        if gap == len(order):
            if at == len(text):
                return [*spans, span]
        elif (gap, at) not in dead:
            dead.add((gap, at))
            spans.append(span)
            pending.append(steps(gap, at))
    return None
