"""What locating messages in a rendering yields, and how a rendering is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: One rendering: the contents of all messages, in the place of their own, to the text.
RenderContents = Callable[[Sequence[str]], str]


class Untrackable(ValueError):
    """A rendering in which the messages cannot be located."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `[start, stop)` of a rendering that are words of message `message`."""

    start: int
    stop: int
    message: int
