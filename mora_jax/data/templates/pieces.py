"""Located contents to pieces: whose every stretch of a rendering is, between the contents too.

Of a turn that holds more than words (tool calls, reasoning) only the template knows how it writes them, so the turn
is found by what stands around it: where the rendering of the messages before it with the generation prompt ends, and
where the end of turn follows. Both are looked for in the template's own text alone. Calls stand in that text, so
where they end is seen by what changes with their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

from mora_jax.data.conversation import Message
from mora_jax.data.segments import Piece, Segment
from mora_jax.data.templates.tracking import Located, Span, TemplateLayout, Untrackable, find_layout
from mora_jax.data.templates.turn_markers import Frame

#: Renders messages with these contents, with the generation prompt after them if so asked.
RenderMessages = Callable[[Sequence[Message], Sequence[str], bool], str]

#: The name and the arguments of a call, when they are to be others than the real ones.
_WORD = "QzCallxCallzQ"


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


class CallsNotShown(ValueError):
    """A template that renders the same whatever is called."""


def find_answer(
    turn: int,
    messages: Sequence[Message],
    owners: Sequence[int],
    contents: Sequence[str],
    located: Located,
    render: RenderMessages,
    closings: Sequence[str],
    specials: Sequence[str],
) -> Answer:
    """Finds what the model has to produce of one turn.

    Args:
      turn: the number of the message.
      messages: of the conversation.
      owners: for each content the message that says it.
      contents: the texts.
      located: where they stand.
      render: runs the template.
      closings: how an answer may end.
      specials: special tokens, one of which may end a call of tools alone.

    Raises:
      Untrackable: if its beginning or its end cannot be told.
      CallsNotShown: if the template does not write its tool calls.
    """
    layout = located.layout
    if layout is None:
        raise Untrackable(f"it looks into what message {turn + 1} says beside its tool calls or reasoning")

    def other_layout(others: Sequence[Message], prompt: bool = False) -> TemplateLayout:
        count = sum(owner < len(others) for owner in owners)
        return find_layout(
            lambda given: render(others, given, prompt), contents[:count], located.groups[:count], located.uses_content
        )

    first, offset = _beginning(turn, messages, layout, other_layout)
    own = [index + 1 for index, content in enumerate(layout.order) if owners[content] == turn]
    last = max((first, *own))
    literal = layout.literals[last]
    after = offset if last == first else 0
    if messages[turn].tool_calls:
        after = max(after, _end_of_calls(turn, messages, layout, last, other_layout))
    found = _first(closings, literal, after) or _first(specials if closings else (), literal, after)
    if not found and turn + 1 == len(messages) and not closings:
        found = [(len(literal), len(literal))]  # Nothing ends an answer in this template.
    if not found:
        raise Untrackable(f"it does not show where message {turn + 1} (assistant) ends")
    [(end, stop)] = found
    spans = located.spans
    calls = bool(messages[turn].tool_calls)
    return Answer(_place(spans, first, offset), _place(spans, last, end), _place(spans, last, stop), calls)


def _first(closings: Sequence[str], literal: str, after: int) -> list[tuple[int, int]]:
    """Where the first of the closings in a literal begins and ends, if one is there."""
    found = [(at, -len(closing)) for closing in closings if (at := literal.find(closing, after)) >= 0]
    return [(at, at - size) for at, size in sorted(found)[:1]]


def _place(spans: Sequence[Span], literal: int, offset: int) -> int:
    """A place in the rendering, from a place in a literal of its layout."""
    return offset + (spans[literal - 1].stop if literal else 0)


def _beginning(
    turn: int, messages: Sequence[Message], layout: TemplateLayout, other_layout: Callable[..., TemplateLayout]
) -> tuple[int, int]:
    """The literal in which the turn begins, and where in it."""
    if not turn:
        raise Untrackable("the conversation begins with tool calls or reasoning")
    prompt = other_layout(messages[:turn], True)
    first = 0
    if prompt.order:
        if prompt.order[-1] not in layout.order:
            raise Untrackable(f"it does not show what stands before message {turn + 1}")
        first = len(layout.order) - layout.order[::-1].index(prompt.order[-1])
    if not layout.literals[first].startswith(prompt.literals[-1]):
        raise Untrackable(f"its generation prompt is not how it begins message {turn + 1} (assistant)")
    return first, len(prompt.literals[-1])


def _end_of_calls(
    turn: int,
    messages: Sequence[Message],
    layout: TemplateLayout,
    last: int,
    other_layout: Callable[..., TemplateLayout],
) -> int:
    """Where in a literal the last thing stands that depends on the arguments of the turn's calls."""
    renamed = other_layout(_with_calls(messages, turn, name=_WORD))
    if renamed == layout:
        raise CallsNotShown
    changed = other_layout(_with_calls(messages, turn, arguments={_WORD: _WORD}))
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


@dataclass(slots=True)
class _Stretch:
    start: int
    stop: int
    segment: Segment
    turn: int


def label(
    text: str,
    spans: Sequence[Span],
    contents: Sequence[Content],
    answers: Mapping[int, Answer],
    frame: Frame,
    eos: str,
) -> list[Piece]:
    """The pieces of a rendering.

    Between the words of two messages stands what closes the one and then what opens the other.

    Args:
      text: the rendering.
      spans: where the words stand, in the order of the text.
      contents: the texts that the spans are of.
      answers: by turn, where the turns stand that hold more than words.
      frame: what the template writes around messages.
      eos: ends an answer in a template that ends none.
    """
    stretches = _said(text, spans, contents, answers, frame)
    for turn, answer in answers.items():
        stretches += _rest(text, turn, answer, spans, contents)
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


def _said(
    text: str, spans: Sequence[Span], contents: Sequence[Content], answers: Mapping[int, Answer], frame: Frame
) -> list[_Stretch]:
    """The words and what closes them."""
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
    own = [span for span in spans if contents[span.content].turn == turn]
    at, before = answer.start, Segment.TOOL_CALL
    for span in own:
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
