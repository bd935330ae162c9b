"""Rows: what every data format is turned into before it is rendered.

Most rows are conversations. A row may also bring its own parts (`Passage`) or its own token ids (`TokenRow`);
these say themselves what is trained, and no template touches them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from mora_jax.data.segments import ROLE_SEGMENT


class Side(IntEnum):
    """How a row of preferences judges its answer. A chosen row is followed by the rejected one of its pair."""

    NONE = 0
    CHOSEN = 1
    REJECTED = 2
    DESIRED = 3
    UNDESIRED = 4


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
      role: `system`, `user`, `assistant` or `tool`.
      content: the words of the turn.
      context: the `input` of an Alpaca row, which some templates place on its own.
      weight: what the turn's words and its end count, whatever the loss mode says; None leaves it to the mode.
      name: of the speaker or the tool, for templates that show it.
      reasoning: what the assistant thought before it answered (`reasoning_content`), for templates that show it.
      tool_calls: the assistant's calls, each as `{"type": "function", "function": {"name": ..., "arguments":
        {...}}}`, for templates that show them.
      tool_call_id: which call a tool's result answers, for templates that show it.
    """

    role: str
    content: str
    context: str = ""
    weight: float | None = None
    name: str = ""
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLE_SEGMENT:
            raise ValueError(f"unknown role {self.role!r}: expected one of {', '.join(ROLE_SEGMENT)}")

    @property
    def text(self) -> str:
        """The content, then a blank line and the context if there is one."""
        return f"{self.content}\n\n{self.context}" if self.context else self.content

    def __str__(self) -> str:
        extra = f" (+{len(self.tool_calls)} tool calls)" if self.tool_calls else ""
        return f"{self.role:>10}: {self.text}{extra}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row of messages, or plain text that is trained as it is.

    Attributes:
      messages: the turns; empty for plain text.
      text: the plain text, or None.
      source: file and row, for messages to the user.
      weight: what the whole row counts beside the others.
      tools: descriptions of the tools that the assistant may call, for templates that show them.
      side: how its answer is judged, in data of preferences.
      answer: the message with which that answer begins.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    source: str = ""
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()
    side: Side = Side.NONE
    answer: int = 0

    def __str__(self) -> str:
        return self.text if self.text is not None else "\n".join(map(str, self.messages))


@dataclass(frozen=True, slots=True)
class Passage:
    """A row of texts that are joined as they stand, each with its weight: no template, no end added.

    Attributes:
      parts: `(text, weight)`; weight 0 is not trained.
      source: file and row.
      weight: what the whole row counts beside the others.
      side, answer: as of a `Conversation`, by parts.
    """

    parts: tuple[tuple[str, float], ...]
    source: str = ""
    weight: float = 1.0
    side: Side = Side.NONE
    answer: int = 0

    def __str__(self) -> str:
        return "\n".join(f"{weight:>10g}: {text}" for text, weight in self.parts)


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row that was tokenised elsewhere.

    Attributes:
      input_ids: `[T]`.
      weights: `[T]`, the weight of predicting each token; None: every token is trained.
      source: file and row.
      weight: what the whole row counts beside the others.
    """

    input_ids: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    source: str = ""
    weight: float = 1.0

    def __str__(self) -> str:
        trained = len(self.input_ids) if self.weights is None else sum(w != 0 for w in self.weights)
        return f"{len(self.input_ids)} tokens, {trained} of them trained"


Row = Conversation | Passage | TokenRow
