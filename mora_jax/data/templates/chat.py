"""A chat template in Jinja: each conversation is rendered once and split into pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from mora_jax.data.conversation import Conversation, Message
from mora_jax.data.segments import ROLE_SEGMENT, Piece, Segment
from mora_jax.data.templates.jinja import JinjaTemplate, at
from mora_jax.data.templates.pieces import Answer, CallsNotShown, Content, find_answer, label
from mora_jax.data.templates.tracking import Located, Span, Tracker, Untrackable
from mora_jax.data.templates.turn_markers import Frame, find_frame, special_tokens
from mora_jax.errors import InputError


class ChatTemplate:
    """Renders conversations with a Jinja template and says what each character is.

    Args:
      template: the template with its tokenizer.
      unshown: counts rows of which the template leaves out `tools` or `reasoning`.
    """

    def __init__(self, template: JinjaTemplate, unshown: Counter[str]):
        self._template = template
        self._tracker = Tracker()
        self._shows_tools: dict[tuple[str, ...], bool] = {}
        self._unshown = unshown

    @property
    def name(self) -> str:
        """What to call it in messages to the user."""
        return self._template.name

    @property
    def program(self) -> str:
        """The template's source."""
        return self._template.program

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text of the messages up to where an answer begins."""
        texts = [content.text for content in _contents(messages)]
        return self._template.render(_turns(messages, texts), tools, prompt=True)

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """The stretches of a whole conversation.

        Raises:
          InputError: if the template refuses the messages.
          Untrackable: if the messages cannot be located in what it renders.
        """
        messages, tools, source = conversation.messages, conversation.tools, conversation.source

        def render(messages: Sequence[Message], texts: Sequence[str], prompt: bool = False) -> str:
            return self._template.render(_turns(messages, texts), tools, prompt=prompt, source=source)

        contents = list(_contents(messages))
        texts = [one.text for one in contents]
        text = render(messages, texts)
        located = self._tracker.locate(
            lambda given: render(messages, given),
            [f"{one.role} {one.segment.name}" for one in contents],
            texts,
            text,
            self.program,
            _extras(conversation),
        )
        _check(located.spans, contents)
        try:
            answers = self._answers(messages, contents, located, render)
        except CallsNotShown:
            raise InputError(
                f"{at(source)}{self.name} does not show tool calls;"
                " set data.template=chatml, the built-in one that writes them"
            ) from None
        self._count_unshown(conversation, contents, located.spans, text)
        eos = self._template.tokenizer.eos_token or ""
        pieces = label(text, located.spans, contents, answers, self.frame, eos)
        if "".join(piece.text for piece in pieces) not in (text, text + eos):
            raise Untrackable("the messages in its output overlap")
        return pieces

    def _answers(
        self, messages: Sequence[Message], contents: Sequence[Content], located: Located, render: Any
    ) -> dict[int, Answer]:
        """Where the turns stand that hold more than words."""
        rich = [i for i, message in enumerate(messages) if message.tool_calls or message.reasoning]
        if not rich:
            return {}
        closings, specials = self.frame.answer_closings, special_tokens(self._template.tokenizer)
        owners, texts = [one.turn for one in contents], [one.text for one in contents]
        return {turn: find_answer(turn, messages, owners, texts, located, render, closings, specials) for turn in rich}

    def _count_unshown(
        self, conversation: Conversation, contents: Sequence[Content], spans: Sequence[Span], text: str
    ) -> None:
        shown = {span.content for span in spans}
        if any(one.segment == Segment.REASONING and i not in shown for i, one in enumerate(contents)):
            self._unshown["reasoning"] += 1
        if conversation.tools:
            roles = tuple(message.role for message in conversation.messages)
            if roles not in self._shows_tools:
                turns = _turns(conversation.messages, [one.text for one in contents])
                without = self._template.render(turns, source=conversation.source)
                self._shows_tools[roles] = text != without
            self._unshown["tools"] += not self._shows_tools[roles]

    @cached_property
    def frame(self) -> Frame:
        """What the template writes around messages."""
        return find_frame(self._template)

    @property
    def notes(self) -> list[str]:
        """What a user should know about the template."""
        try:
            frame = self.frame
        except Untrackable as error:
            return [f"the chat template cannot be tracked, {error}"]
        notes = []
        if frame.lead is None:
            notes.append("the chat template's generation prompt is not how it begins an answer in training")
        elif frame.lead.strip():
            notes.append(
                f"the chat template writes {frame.lead!r} between its generation prompt and an answer: not trained"
            )
        if frame.cuts_thoughts:
            notes.append(
                "the chat template leaves the reasoning of earlier answers out: only the last is trained on it"
            )
        if frame.rewrites:
            notes.append("the chat template renders a turn in another way when more turns follow")
        return notes


def _contents(messages: Sequence[Message]) -> Iterator[Content]:
    """All texts of the messages: what each says, then what it thought before."""
    for turn, message in enumerate(messages):
        yield Content(turn, message.role, ROLE_SEGMENT[message.role], message.text or "")
        if message.reasoning:
            yield Content(turn, message.role, Segment.REASONING, message.reasoning)


def _turns(messages: Sequence[Message], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Messages as `apply_chat_template` takes them, with these texts."""
    given = iter(texts)
    turns = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": next(given)}
        if message.reasoning:
            turn["reasoning_content"] = next(given)
        if message.name:
            turn["name"] = message.name
        if message.tool_call_id:
            turn["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            turn["tool_calls"] = [dict(call) for call in message.tool_calls]
        turns.append(turn)
    return turns


def _extras(conversation: Conversation) -> str | None:
    """What a rendering depends on besides roles and texts; None if hardly two rows have it in common."""
    messages = conversation.messages
    if any(message.tool_calls for message in messages):
        return None
    names = [message.name for message in messages]
    return repr((names, conversation.tools)) if conversation.tools or any(names) else ""


def _check(spans: Sequence[Span], contents: Sequence[Content]) -> None:
    """Refuses renderings in which an answer is missing, or comes twice."""
    shown = [0] * len(contents)
    for span in spans:
        shown[span.content] += span.stop - span.start
    for index, one in enumerate(contents):
        if one.role != "assistant":
            continue
        where = f"message {one.turn + 1} ({one.role})"
        if one.segment == Segment.ASSISTANT and not shown[index] and one.text.strip():
            raise Untrackable(f"it does not show the words of {where}")
        if shown[index] > len(one.text):
            raise Untrackable(f"it repeats {where}")
