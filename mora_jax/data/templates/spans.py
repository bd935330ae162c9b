"""What locating words in a rendering yields, and how a rendering is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: One rendering: all contents, in the place of a conversation's own, to the text.
RenderContents = Callable[[Sequence[str]], str]


class Untrackable(ValueError):
    """A rendering in which the messages cannot be located."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `[start, stop)` of a rendering that are those of content number `content`."""

    start: int
    stop: int
    content: int
