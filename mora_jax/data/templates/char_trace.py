"""The second way to locate messages in a rendering, for templates that look into what the messages say.

Every character of the contents is replaced by a character of its own from the private planes, but for space
and for tags that the template may look for, and each is found again in the rendering.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from mora_jax.data.templates.spans import RenderContents, Span, Untrackable

# Left as they are, because templates look for them: space, and tags that the template's source holds.
_KEPT = re.compile(r"<[^<>\n]{1,64}>|\[/?[A-Za-z_]{1,32}\]|\s+")
_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_PRIVATE_SIZE = sum(map(len, _PRIVATE))


def _private(index: int) -> str:
    first, second = _PRIVATE
    return chr(first[index] if index < len(first) else second[index - len(first)])


def _private_index(character: str) -> int | None:
    code = ord(character)
    first, second = _PRIVATE
    if code in first:
        return code - first.start
    return len(first) + code - second.start if code in second else None


def trace(
    render: RenderContents, contents: Sequence[str], groups: Sequence[int], text: str, program: str
) -> list[Span]:
    """Locates the contents character by character, in a rendering that depends on what they say.

    Args:
      render: runs the template.
      contents: the real contents.
      groups: as for `find_layout`; equal messages get equal codes.
      text: the real rendering.
      program: the template's source.

    Raises:
      Untrackable: if the template treats the coded contents in another way than the real ones.
    """
    places = _choose_places(contents, sorted(set(groups)), program)
    coded = [list(content) for content in contents]
    for code, (i, j) in enumerate(places):
        coded[i][j] = _private(code)
    rendered = render(["".join(coded[group]) for group in groups])
    if len(rendered) != len(text):
        raise Untrackable("its output depends on the words of the messages")
    origin: list[tuple[int, int] | None] = [None] * len(text)
    for k, (seen, real) in enumerate(zip(rendered, text, strict=True)):
        code_seen = _private_index(seen)
        place = places[code_seen] if code_seen is not None and code_seen < len(places) else None
        if place is not None and contents[place[0]][place[1]] == real:
            origin[k] = place
        elif seen != real:
            raise Untrackable("its output depends on the words of the messages")
    _fill_gaps(origin, places, contents, text)
    runs = list(_runs(origin, text))
    # A run that does not begin after the one before in its group is the next of the equal messages.
    turns: dict[int, tuple[int, int]] = {}
    spans = []
    for start, stop in runs:
        place = origin[start]
        assert place is not None
        group, at = place
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
    for found in _KEPT.finditer(content):
        space = found[0].isspace()
        if space or found[0][:-1] in program:
            region.extend(range(at, found.start()))
            at = found.end()
            if not space:
                yield region
                region = []
    region.extend(range(at, len(content)))
    yield region


def _choose_places(contents: Sequence[str], which: Iterable[int], program: str) -> list[tuple[int, int]]:
    """All characters of all regions; of very long contents some, but the first and last of each region."""
    regions = [(i, region) for i in which for region in _regions(contents[i], program) if region]
    step = -(-sum(len(region) for _, region in regions) // (_PRIVATE_SIZE // 2)) or 1
    if step > 1:
        regions = [(i, sorted({*region[::step], region[-1]})) for i, region in regions]
    places = [(i, j) for i, region in regions for j in region]
    if len(places) > _PRIVATE_SIZE:
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


def _runs(origin: Sequence[tuple[int, int] | None], text: str) -> Iterator[tuple[int, int]]:
    """Runs of one message, without the space at their edges, which may be the template's as well."""
    start = 0
    for stop in range(1, len(origin) + 1):
        first = origin[start]
        if stop < len(origin) and first is not None:
            here = origin[stop]
            if here is not None and here[0] == first[0] and here[1] > first[1]:
                continue
        if first is not None:
            words = text[start:stop]
            left = start + len(words) - len(words.lstrip())
            right = start + len(words.rstrip())
            if left < right:
                yield left, right
        start = stop
