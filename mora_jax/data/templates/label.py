"""Located words to pieces: whose every stretch of a rendering is, between the words too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mora_jax.data.segments import Piece, Segment
from mora_jax.data.templates.answers import Answer
from mora_jax.data.templates.tracking import Span
from mora_jax.data.templates.turn_markers import Frame


@dataclass(frozen=True, slots=True)
class Words:
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
    words: Sequence[Words],
    answers: Mapping[int, Answer],
    frame: Frame,
    eos: str,
) -> list[Piece]:
    """The pieces of a rendering.

    Between the words of two messages stands what closes the one and then what opens the other.

    Args:
      text: the rendering.
      spans: where the words stand, in the order of the text.
      words: the texts that the spans are of.
      answers: by turn, where the turns stand that hold more than words.
      frame: what the template writes around messages.
      eos: ends an answer in a template that ends none.
    """
    stretches = _said(text, spans, words, answers, frame)
    for turn, answer in answers.items():
        stretches += _rest(text, turn, answer, spans, words)
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
    if words and words[-1].role == "assistant" and not frame.closing and eos:
        pieces.append(Piece(rest + eos, Segment.END_OF_TURN, words[-1].turn))
    elif rest:
        pieces.append(Piece(rest, Segment.TEMPLATE))
    return pieces


def _said(
    text: str, spans: Sequence[Span], words: Sequence[Words], answers: Mapping[int, Answer], frame: Frame
) -> list[_Stretch]:
    """The words and what closes them."""
    lead = frame.lead if frame.lead and frame.lead.isspace() else ""
    stretches: list[_Stretch] = []
    owners = [words[span.content].turn for span in spans]
    last_of = {turn: index for index, turn in enumerate(owners)}
    seen: set[int] = set()
    at = 0
    for index, (span, turn) in enumerate(zip(spans, owners, strict=True)):
        said = words[span.content]
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


def _rest(text: str, turn: int, answer: Answer, spans: Sequence[Span], words: Sequence[Words]) -> Iterator[_Stretch]:
    """What the model has to produce of a turn besides its words."""
    own = [span for span in spans if words[span.content].turn == turn]
    at, before = answer.start, Segment.TOOL_CALL
    for span in own:
        segment = words[span.content].segment
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
