"""Conversations: what every data format is turned into before it is rendered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from mora_jax.data.segments import ROLE_SEGMENT


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
      role: `system`, `user`, `assistant` or `tool`.
      content: the words of the turn.
      context: the `input` of an Alpaca row, which some templates place on its own.
    """

    role: str
    content: str
    context: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLE_SEGMENT:
            raise ValueError(f"unknown role {self.role!r}: expected one of {', '.join(ROLE_SEGMENT)}")

    @property
    def text(self) -> str:
        """The content, then a blank line and the context if there is one."""
        return f"{self.content}\n\n{self.context}" if self.context else self.content


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row of data: either messages, or plain text that is learned as it stands.

    Attributes:
      messages: the turns; empty for plain text.
      text: the plain text, or None.
      source: file and row, for messages to the user.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Rows(Sequence[Conversation]):
    """The conversations of one or more files: a sequence of them.

    Attributes:
      conversations: in the order of the files.
      format: the name of the format they were read as; empty if they come from no file.
      files: the paths.
    """

    conversations: list[Conversation]
    format: str = ""
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.conversations)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        return self.conversations[index]

    def __str__(self) -> str:
        return (
            f"{len(self)} rows of format `{self.format or 'none'}` from {', '.join(self.files) or 'memory'}"
        )
