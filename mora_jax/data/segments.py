"""What a token is: the label that the renderer gives every stretch of text."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

Label = TypeVar("Label", bound=Hashable)


class Segment(IntEnum):
    """The part of a conversation that a token belongs to; loss modes map it to a weight."""

    PADDING = 0
    BOS = 1
    TEMPLATE = 2
    SYSTEM = 3
    USER = 4
    TOOL = 5
    ASSISTANT = 6
    END_OF_TURN = 7
    REASONING = 8
    TOOL_CALL = 9
    HEADER = 10
    CLOSING = 11

    @property
    def label(self) -> str:
        """The name in lower case, as JSON and the command line show it; all of the template's text is one."""
        return Segment.TEMPLATE.name.lower() if self in TEMPLATE_TEXT else self.name.lower()


#: What the template writes: what belongs to no turn, what opens a turn, what closes a turn of anyone but the
#: assistant (whose end, END_OF_TURN, the model has to produce).
TEMPLATE_TEXT = (Segment.TEMPLATE, Segment.HEADER, Segment.CLOSING)
#: Segments that instruct, and those that the model is to produce.
INSTRUCTION = (Segment.SYSTEM, Segment.USER, Segment.TOOL)
ANSWER = (Segment.ASSISTANT, Segment.REASONING, Segment.TOOL_CALL)
RESPONSE = (*ANSWER, Segment.END_OF_TURN)
#: Segments that hold a message's own words (everything else comes from the template or the tokenizer).
CONTENT = (*INSTRUCTION, *ANSWER)

ROLE_SEGMENT = {
    "system": Segment.SYSTEM,
    "user": Segment.USER,
    "tool": Segment.TOOL,
    "assistant": Segment.ASSISTANT,
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of rendered text that belongs to one segment.

    Attributes:
      text: the characters.
      segment: what they are.
      turn: the number of the message that they say, open or close, from 0; -1 for none.
    """

    text: str
    segment: Segment
    turn: int = -1


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as one string, with the segment of every character.

    Attributes:
      text: what is tokenised, once.
      pieces: consecutive stretches whose texts join to `text`.
      source: where the conversation came from, for messages to the user.
    """

    text: str
    pieces: tuple[Piece, ...]
    source: str = ""

    @classmethod
    def join(cls, pieces: Iterable[Piece], source: str = "") -> Rendered:
        """Joins consecutive pieces.

        Args:
          pieces: in order; empty ones are left out.
          source: file and row, for messages.

        Returns:
          The text with its pieces.
        """
        filled = tuple(piece for piece in pieces if piece.text)
        return cls("".join(piece.text for piece in filled), filled, source)

    def __str__(self) -> str:
        return "\n".join(f"{piece.segment.label:>12} {piece.text!r}" for piece in self.pieces)


def runs(labels: Iterable[Label]) -> Iterator[tuple[Label, slice]]:
    """Stretches of equal labels.

    >>> list(runs("aab"))
    [('a', slice(0, 2, None)), ('b', slice(2, 3, None))]
    """
    start = 0
    for label, members in itertools.groupby(labels):
        stop = start + sum(1 for _ in members)
        yield label, slice(start, stop)
        start = stop
