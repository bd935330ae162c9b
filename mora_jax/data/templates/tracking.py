"""Where the contents of messages stand in what a chat template renders.

A template is a program: it may strip, reorder, merge or drop what it is given. It is therefore never parsed,
and its markers are never searched for. It is run on stand-ins, and what it does to them is compared with what
it does to the real messages: as a whole first (`match_layout`), character by character where that does not
explain the rendering (`trace`), for templates that look into what the messages say. If neither does, the
template cannot be tracked.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

#: One rendering: all contents, in the place of a conversation's own, to the text.
RenderContents = Callable[[Sequence[str]], str]

_MAX_LAYOUTS = 1024
_STAND_IN = re.compile(r"Qz(\d+)xMessage\1xzQ")
# Traced characters are replaced by those of the private planes. Left as they are, because templates look for them:
# space, and tags that the template's source holds.
_FIRST_CODE, _CODES = 0xF0000, 0x10FFFE - 0xF0000
_UNCODED = re.compile(r"<[^<>\n]{1,64}>|\[/?[A-Za-z_]{1,32}\]|\s+")


class Untrackable(ValueError):
    """A rendering in which the messages cannot be located."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `[start, stop)` of a rendering that are those of content number `content`."""

    start: int
    stop: int
    content: int


@dataclass(frozen=True)
class TemplateLayout:
    """What a template writes around the contents.

    Attributes:
      literals: the template's text before each content and after the last; one more than `order`.
      order: which content each gap between literals holds.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Located:
    """Where contents stand.

    Attributes:
      spans: in the order of the text.
      groups: for each content the first one that was treated as its equal.
      layout: the template's own text around the contents; None if they were traced character by character.
      uses_content: which contents belong to the layout.
    """

    spans: list[Span]
    groups: Sequence[int]
    layout: TemplateLayout | None
    uses_content: Sequence[bool] = ()


class Tracker:
    """Locates contents in renderings of one template; remembers its layouts, one a sequence of kinds."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[Any, ...], TemplateLayout] = {}

    def locate(
        self,
        render: RenderContents,
        kinds: Sequence[str],
        contents: Sequence[str],
        text: str,
        program: str,
        extras: str | None = "",
    ) -> Located:
        """Where each content stands.

        Args:
          render: runs the template on these messages with other contents.
          kinds: of the contents: the role, and what they are of the message.
          contents: the texts.
          text: what the template made of them.
          program: the template's source.
          extras: what else the rendering depends on; None if that is nothing worth remembering.

        Raises:
          Untrackable: if the rendering cannot be explained.
        """
        apart = range(len(contents))
        first: dict[tuple[str, str], int] = {}
        equal = [first.setdefault(one, i) for i, one in enumerate(zip(kinds, contents, strict=True))]
        # Equal contents are told apart, unless the template compares messages ("is this the last question?").
        groupings: list[Sequence[int]] = [apart] if len(first) == len(contents) else [apart, equal]
        # Templates may leave out a turn that says nothing, so empty and blank contents are tried as they are too.
        empty, blank = [not content for content in contents], [not content.strip() for content in contents]
        for uses_content in dict.fromkeys(map(tuple, ([False] * len(kinds), empty, blank))):
            used = [content for content, is_used in zip(contents, uses_content, strict=True) if is_used]
            for groups in groupings:
                key = None if extras is None else (*kinds, *groups, *uses_content, *used, extras)
                for layout in self._layouts_for(render, contents, groups, uses_content, key):
                    spans = match_layout(layout, contents, text)
                    if spans is not None:
                        return Located(spans, groups, layout, uses_content)
        for groups in groupings[:-1]:
            with contextlib.suppress(Untrackable):
                return Located(trace(render, contents, groups, text, program), groups, None)
        return Located(trace(render, contents, groupings[-1], text, program), groupings[-1], None)

    def _layouts_for(
        self,
        render: RenderContents,
        contents: Sequence[str],
        groups: Sequence[int],
        uses_content: Sequence[bool],
        key: tuple[Any, ...] | None,
    ) -> Iterator[TemplateLayout]:
        """The layout as remembered, then a new one: templates can write the time."""
        if key in self._layouts:
            yield self._layouts[key]
        layout = find_layout(render, contents, groups, uses_content)
        if key is not None:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = layout
        yield layout


def stand_in(index: int) -> str:
    """A word that no template holds, with nothing in it that a template could strip or look for."""
    return f"Qz{index}xMessage{index}xzQ"


def find_layout(
    render: RenderContents, contents: Sequence[str], groups: Sequence[int], uses_content: Sequence[bool]
) -> TemplateLayout:
    """Renders stand-ins and reads the template's own text around them.

    Args:
      render: runs the template.
      contents: the real contents.
      groups: for each content the first one that it is treated as the equal of: these get equal stand-ins.
      uses_content: for each content, whether it is rendered itself instead of a stand-in (and not located).
    """
    text = render([contents[i] if uses_content[i] else stand_in(group) for i, group in enumerate(groups)])
    parts = _STAND_IN.split(text)
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    # Equal contents come one after the other.
    order = [members[group].pop(0) if members[group][1:] else members[group][0] for group in map(int, parts[1::2])]
    return TemplateLayout(tuple(parts[::2]), tuple(order))


def match_layout(layout: TemplateLayout, contents: Sequence[str], text: str) -> list[Span] | None:
    """The spans of the contents if the text is the layout filled with them, each plain or stripped, else None."""
    # Where each literal can end, with the span before it: several ends where a content can be stripped in several ways.
    ends: list[dict[int, Span]] = []
    reached: Iterable[int] = [len(layout.literals[0])] if text.startswith(layout.literals[0]) else []
    for content, literal in zip(layout.order, layout.literals[1:], strict=True):
        fits = _stripped(contents[content])
        steps: dict[int, Span] = {}
        for start in reached:
            for said in fits:
                stop = start + len(said)
                if text.startswith(said, start) and text.startswith(literal, stop):
                    steps.setdefault(stop + len(literal), Span(start, stop, content))
        ends.append(steps)
        reached = steps
    at = len(text)
    if at not in reached:
        return None
    spans: list[Span] = []
    for steps in reversed(ends):
        spans.append(steps[at])
        at = steps[at].start
    return spans[::-1]


def _stripped(text: str) -> dict[str, None]:
    """A content as a template may write it: as it is, or without the space or the line feeds at its ends or at one."""
    sides = (text.strip, text.lstrip, text.rstrip)
    return dict.fromkeys((text, *(side(chars) for chars in (None, "\n") for side in sides)))


def trace(
    render: RenderContents, contents: Sequence[str], groups: Sequence[int], text: str, program: str
) -> list[Span]:
    """Locates the contents character by character, in a rendering that depends on what they say.

    Args:
      render: runs the template.
      contents: the real contents.
      groups: as for `find_layout`; equal contents get equal codes.
      text: the real rendering.
      program: the template's source.

    Raises:
      Untrackable: if the template treats the coded contents in another way than the real ones.
    """
    places = _choose_places(contents, sorted(set(groups)), program)
    coded = [list(content) for content in contents]
    for code, (i, j) in enumerate(places):
        coded[i][j] = chr(_FIRST_CODE + code)
    rendered = render(["".join(coded[group]) for group in groups])
    if len(rendered) != len(text):
        raise Untrackable("its output depends on the words of the messages")
    origin: list[tuple[int, int] | None] = [None] * len(text)
    for k, (seen, real) in enumerate(zip(rendered, text, strict=True)):
        code = ord(seen) - _FIRST_CODE
        place = places[code] if 0 <= code < len(places) else None
        if place is not None and contents[place[0]][place[1]] == real:
            origin[k] = place
        elif seen != real:
            raise Untrackable("its output depends on the words of the messages")
    _fill_gaps(origin, places, contents, text)
    # A run that does not begin after the one before in its group is the next of the equal messages.
    turns: dict[int, tuple[int, int]] = {}
    spans = []
    for start, stop, (group, at) in _runs(origin, text):
        turn, before = turns.get(group, (0, -1))
        turn += at <= before
        turns[group] = (turn, at)
        equal = [i for i, other in enumerate(groups) if other == group]
        spans.append(Span(start, stop, equal[min(turn, len(equal) - 1)]))
    return spans


def _regions(content: str, program: str) -> Iterator[list[int]]:
    """The characters to replace, between tags that the template may look for; space is none of them."""
    region: list[int] = []
    at = 0
    for uncoded in _UNCODED.finditer(content):
        space = uncoded[0].isspace()
        if space or uncoded[0][:-1] in program:
            region.extend(range(at, uncoded.start()))
            at = uncoded.end()
            if not space:
                yield region
                region = []
    region.extend(range(at, len(content)))
    yield region


def _choose_places(contents: Sequence[str], which: Iterable[int], program: str) -> list[tuple[int, int]]:
    """All characters of all regions; of very long contents some, but the first and last of each region."""
    regions = [(i, region) for i in which for region in _regions(contents[i], program) if region]
    step = -(-sum(len(region) for _, region in regions) // (_CODES // 2)) or 1
    if step > 1:
        regions = [(i, sorted({*region[::step], region[-1]})) for i, region in regions]
    places = [(i, j) for i, region in regions for j in region]
    if len(places) > _CODES:
        raise Untrackable("it looks into messages that are too long to follow")
    return places


def _fill_gaps(
    origin: list[tuple[int, int] | None],
    places: Sequence[tuple[int, int]],
    contents: Sequence[str],
    text: str,
) -> None:
    """Takes in what was not coded (tags, space), where it stands whole between located characters.

    The ends of a content count as located. A gap of which a part is missing stays the template's: what looks
    like its rest may be the template's own text.
    """
    coded: dict[int, list[int]] = {}
    for i, j in places:
        coded.setdefault(i, []).append(j)
    following = {(i, a): b for i, js in coded.items() for a, b in pairwise([*js, len(contents[i])])}
    for k, place in enumerate(list(origin)):
        if place is None:
            continue
        i, j = place
        if j == coded[i][0] and text.endswith(contents[i][:j], 0, k):
            origin[k - j : k] = [(i, at) for at in range(j)]
        end = following[place]
        gap = contents[i][j + 1 : end]
        after = k + 1 + len(gap)
        closed = end == len(contents[i]) or (after < len(origin) and origin[after] == (i, end))
        if closed and text.startswith(gap, k + 1):
            origin[k + 1 : after] = [(i, at) for at in range(j + 1, end)]


def _runs(origin: Sequence[tuple[int, int] | None], text: str) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Runs of one content, each with the origin of its first character.

    They go without the space at their edges, which may be the template's as well.
    """
    start = 0
    for stop in range(1, len(origin) + 1):
        first = origin[start]
        if stop < len(origin) and first is not None:
            here = origin[stop]
            if here is not None and here[0] == first[0] and here[1] > first[1]:
                continue
        if first is not None:
            said = text[start:stop]
            left, right = start + len(said) - len(said.lstrip()), start + len(said.rstrip())
            if left < right:
                yield left, right, origin[left] or first
        start = stop
