"""A rendering with located contents to pieces: whose every stretch of it is, between the contents too.

Of a turn that holds more than words (tool calls, reasoning) only the template knows how it writes them, so the turn
is found by what stands around it: where the rendering of the messages before it with the generation prompt ends, and
where the end of turn follows. Both are looked for in the template's own text alone. Calls stand in that text, so
where they end is seen by what changes with their arguments.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os.path import commonprefix
from typing import Any

from mora_jax.data.conversation import Conversation, Message
from mora_jax.data.segments import ROLE_SEGMENT, Piece, Segment
from mora_jax.data.templates.jinja import Frame, JinjaTemplate, at, find_frame, special_tokens
from mora_jax.data.templates.tracking import Located, Span, TemplateLayout, Tracker, Untrackable, find_layout
from mora_jax.errors import InputError

#: The name and the arguments of a call, when they are to be others than the real ones.
_WORD = "QzCallxCallzQ"


@dataclass(frozen=True, slots=True)
class Content:
    """One text of a message.

    Attributes:
      turn: the number of the message.
      role: of the message.
      segment: what the text is.
      text: the characters.
    """

    turn: int
    role: str
    segment: Segment
    text: str


@dataclass(frozen=True)
class Rendering:
    """What a template made of a conversation.

    Attributes:
      text: the rendering.
      conversation: what is rendered.
      contents: the texts of its messages.
      located: where they stand.
      template: what rendered it.
    """

    text: str
    conversation: Conversation
    contents: Sequence[Content]
    located: Located
    template: "ChatTemplate"

    def layout_of(self, messages: Sequence[Message], prompt: bool = False) -> TemplateLayout:
        """The template's own text around the contents of other messages, so many as there are of these."""
        texts = [content.text for content in self.contents if content.turn < len(messages)]
        count, located = len(texts), self.located
        return find_layout(
            lambda given: self.template.render(self.conversation, messages, given, prompt),
            texts,
            located.groups[:count],
            located.uses_content[:count],
        )

    def place(self, literal: int, offset: int) -> int:
        """A place in the rendering, from a place in a literal of its layout."""
        return offset + (self.located.spans[literal - 1].stop if literal else 0)


@dataclass(frozen=True, slots=True)
class Answer:
    """Where a turn of the assistant stands in a rendering.

    Attributes:
      start: the end of the generation prompt.
      end: where what closes the turn begins.
      stop: where that ends.
      calls: whether it calls tools.
    """

    start: int
    end: int
    stop: int
    calls: bool


def _answer(turn: int, rendering: Rendering) -> Answer:
    """What the model has to produce of a turn that holds more than words.

    Raises:
      Untrackable: if its beginning or its end cannot be told.
      InputError: if the template does not write its tool calls.
    """
    layout, messages, contents = rendering.located.layout, rendering.conversation.messages, rendering.contents
    if layout is None:
        raise Untrackable(f"it looks into what message {turn + 1} says beside its tool calls or reasoning")
    first, offset = _beginning(turn, layout, rendering)
    last = max((first, *(place + 1 for place, index in enumerate(layout.order) if contents[index].turn == turn)))
    literal = layout.literals[last]
    after = offset if last == first else 0
    calls = bool(messages[turn].tool_calls)
    if calls:
        after = max(after, _end_of_calls(turn, layout, last, rendering))
    closings, specials = rendering.template.frame.answer_closings, rendering.template.specials
    # A special token may end a call of tools alone.
    closing = _first(closings, literal, after) or _first(specials if closings else (), literal, after)
    if closing is None and turn + 1 == len(messages) and not closings:
        closing = (len(literal), len(literal))  # Nothing ends an answer in this template.
    if closing is None:
        raise Untrackable(f"it does not show where message {turn + 1} (assistant) ends")
    end, stop = closing
    return Answer(rendering.place(first, offset), rendering.place(last, end), rendering.place(last, stop), calls)


def _first(closings: Sequence[str], literal: str, after: int) -> tuple[int, int] | None:
    """Where the first of the closings in a literal begins and ends, if one is there."""
    places = [(at, -len(closing)) for closing in closings if (at := literal.find(closing, after)) >= 0]
    at, size = min(places, default=(-1, 0))
    return None if at < 0 else (at, at - size)


def _beginning(turn: int, layout: TemplateLayout, rendering: Rendering) -> tuple[int, int]:
    """The literal in which the turn begins, and where in it."""
    if not turn:
        raise Untrackable("the conversation begins with tool calls or reasoning")
    prompt = rendering.layout_of(rendering.conversation.messages[:turn], True)
    first = 0
    if prompt.order:
        if prompt.order[-1] not in layout.order:
            raise Untrackable(f"it does not show what stands before message {turn + 1}")
        first = len(layout.order) - layout.order[::-1].index(prompt.order[-1])
    if not layout.literals[first].startswith(prompt.literals[-1]):
        raise Untrackable(f"its generation prompt is not how it begins message {turn + 1} (assistant)")
    return first, len(prompt.literals[-1])


def _end_of_calls(turn: int, layout: TemplateLayout, last: int, rendering: Rendering) -> int:
    """Where in a literal the last thing stands that depends on the arguments of the turn's calls."""
    messages = rendering.conversation.messages
    renamed = rendering.layout_of(_with_calls(messages, turn, name=_WORD))
    if renamed == layout:
        raise InputError(
            f"{at(rendering.conversation.source)}{rendering.template.name} does not show tool calls;"
            " set data.template=chatml, the built-in one that writes them"
        )
    changed = rendering.layout_of(_with_calls(messages, turn, arguments={_WORD: _WORD}))
    if changed == layout:
        changed = renamed
    if changed.order != layout.order:
        raise Untrackable(f"what it shows depends on the tool calls of message {turn + 1}")
    literal, other = layout.literals[last], changed.literals[last]
    if literal == other:
        return 0
    return len(literal) - len(commonprefix([literal[::-1], other[::-1]]))


def _with_calls(messages: Sequence[Message], turn: int, **change: object) -> list[Message]:
    calls = tuple({**call, "function": {**call["function"], **change}} for call in messages[turn].tool_calls)
    return [replace(m, tool_calls=calls) if i == turn else m for i, m in enumerate(messages)]


@dataclass(slots=True)
class _Stretch:
    start: int
    stop: int
    segment: Segment
    turn: int


def pieces_of(rendering: Rendering) -> list[Piece]:
    """The pieces of a rendering.

    Between the words of two messages stands what closes the one and then what opens the other.

    Raises:
      Untrackable: if it can't be told what some of it is.
      InputError: if the template does not write the tool calls of a turn.
    """
    text, contents, frame, eos = rendering.text, rendering.contents, rendering.template.frame, rendering.template.eos
    messages = rendering.conversation.messages
    rich = [i for i, message in enumerate(messages) if message.tool_calls or message.reasoning]
    answers = {turn: _answer(turn, rendering) for turn in rich}
    stretches = _said(rendering, answers)
    for turn, answer in answers.items():
        stretches += _rest(text, turn, answer, rendering.located.spans, contents)
    if answers:
        stretches.sort(key=lambda stretch: stretch.start)
    pieces: list[Piece] = []
    at = 0
    for stretch in stretches:
        if stretch.start > at:
            pieces += _opening(text[at : stretch.start], stretch, frame, first=at == 0)
        pieces.append(Piece(text[stretch.start : stretch.stop], stretch.segment, stretch.turn))
        at = stretch.stop
    rest = text[at:]
    if contents and contents[-1].role == "assistant" and not frame.closing and eos:
        pieces.append(Piece(rest + eos, Segment.END_OF_TURN, contents[-1].turn))
    elif rest:
        pieces.append(Piece(rest, Segment.TEMPLATE))
    return pieces


def _said(rendering: Rendering, answers: Mapping[int, Answer]) -> list[_Stretch]:
    """The words and what closes them."""
    text, spans, contents, frame = rendering.text, rendering.located.spans, rendering.contents, rendering.template.frame
    lead = frame.lead if frame.lead and frame.lead.isspace() else ""
    stretches: list[_Stretch] = []
    owners = [contents[span.content].turn for span in spans]
    last_of = {turn: index for index, turn in enumerate(owners)}
    seen: set[int] = set()
    at = 0
    for index, (span, turn) in enumerate(zip(spans, owners, strict=True)):
        said = contents[span.content]
        start = span.start
        # Space after the generation prompt: the model has to produce it. `_rest` has that of the turns in `answers`.
        first = said.role == "assistant" and turn not in seen and turn not in answers
        if lead and first and text.endswith(lead, at, start):
            start -= len(lead)
        seen.add(turn)
        stretches.append(_Stretch(start, span.stop, said.segment, turn))
        at = span.stop
        if last_of[turn] != index or turn in answers:
            continue
        following = spans[index + 1].start if index + 1 < len(spans) else len(text)
        answered = said.role == "assistant"
        closings = frame.answer_closings if answered else (frame.asked_closing, frame.inner_closing)
        at = _closed(text, at, following, closings)
        if at > span.stop:
            segment = Segment.END_OF_TURN if answered else Segment.CLOSING
            stretches.append(_Stretch(span.stop, at, segment, turn))
    return stretches


def _closed(text: str, at: int, following: int, closings: Sequence[str]) -> int:
    """Where the closing that begins at `at` ends; `at` itself if there is none before `following`."""
    for closing in closings:
        if closing and text.startswith(closing, at, following):
            return at + len(closing)
        # Where the outer space of traced words was left to the template, the closing comes after it.
        bare = closing.lstrip()
        start = following - len(text[at:following].lstrip())
        if bare and text.startswith(bare, start, following):
            return start + len(bare)
    return at


def _rest(
    text: str, turn: int, answer: Answer, spans: Sequence[Span], contents: Sequence[Content]
) -> Iterator[_Stretch]:
    """What the model has to produce of a turn besides its words."""
    spans_of_turn = [span for span in spans if contents[span.content].turn == turn]
    at, before = answer.start, Segment.TOOL_CALL
    for span in spans_of_turn:
        segment = contents[span.content].segment
        if span.start > at:
            # Tags around reasoning stand before it, and between it and the answer's words.
            beside = Segment.REASONING if Segment.REASONING in (before, segment) else Segment.TOOL_CALL
            if at == answer.start and span.stop > span.start and text[at : span.start].isspace():
                beside = segment
            yield _Stretch(at, span.start, beside, turn)
        at, before = max(at, span.stop), segment
    if answer.end > at:
        yield _Stretch(at, answer.end, Segment.TOOL_CALL if answer.calls else before, turn)
    if answer.stop > answer.end:
        yield _Stretch(answer.end, answer.stop, Segment.END_OF_TURN, turn)


def _opening(gap: str, stretch: _Stretch, frame: Frame, *, first: bool) -> Iterator[Piece]:
    """The template's text before a stretch: before a first question, what no message asked for is set apart."""
    if first and any(map(str.isalnum, frame.header)) and stretch.segment == Segment.USER:
        for header in (frame.header, frame.header.lstrip()):
            if gap.endswith(header) and len(gap) > len(header):
                yield Piece(gap[: -len(header)], Segment.TEMPLATE)
                gap = header
                break
    yield Piece(gap, Segment.HEADER, stretch.turn)


class ChatTemplate:
    """Renders conversations with a Jinja template and says what each character is.

    Args:
      template: the template with its tokenizer.
      unshown: counts rows of which the template leaves out `tools` or `reasoning`.

    Attributes:
      name: what to call it in messages to the user.
      program: the template's source.
      eos: the tokenizer's end-of-sequence text, which ends an answer where the template ends none.
      specials: the tokenizer's special tokens.
    """

    def __init__(self, template: JinjaTemplate, unshown: Counter[str]):
        self._template = template
        self.name, self.program = template.name, template.program
        self.eos: str = template.tokenizer.eos_token or ""
        self.specials = special_tokens(template.tokenizer)
        self._tracker = Tracker()
        self._shows_tools: dict[tuple[str, ...], bool] = {}
        self._unshown = unshown

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of the messages up to where an answer begins."""
        texts = [content.text for content in _contents(messages)]
        return self._template.render(_turns(messages, texts), prompt=True)

    def render(self, row: Conversation, messages: Sequence[Message], texts: Sequence[str], prompt: bool) -> str:
        """The text of messages in the place of a row's own, with these contents; with `prompt` an answer is to follow.

        Raises:
          InputError: if the template refuses them.
        """
        return self._template.render(_turns(messages, texts), row.tools, prompt=prompt, source=row.source)

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """The stretches of a whole conversation.

        Raises:
          InputError: if the template refuses the messages.
          Untrackable: if the messages cannot be located in what it renders.
        """
        contents = list(_contents(conversation.messages))
        texts = [one.text for one in contents]

        def render(texts: Sequence[str]) -> str:
            return self.render(conversation, conversation.messages, texts, False)

        text = render(texts)
        kinds = [f"{one.role} {one.segment.name}" for one in contents]
        located = self._tracker.locate(render, kinds, texts, text, self.program, _extras(conversation))
        _check(located.spans, contents)
        pieces = pieces_of(Rendering(text, conversation, contents, located, self))
        self._count_unshown(conversation, contents, located.spans, text)
        if "".join(piece.text for piece in pieces) not in (text, text + self.eos):
            raise Untrackable("the messages in its output overlap")
        return pieces

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
        does = {
            "'s generation prompt is not how it begins an answer in training": frame.lead is None,
            f" writes {frame.lead!r} between its generation prompt and an answer: not trained": (
                frame.lead or ""
            ).strip(),
            " leaves the reasoning of earlier answers out: only the last is trained on it": frame.cuts_thoughts,
            " renders a turn in another way when more turns follow": frame.rewrites,
        }
        return [f"the chat template{note}" for note, holds in does.items() if holds]


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
