"""What a model has to produce of a turn that holds more than words: tool calls, reasoning.

Only the template knows how it writes them, so the turn is found by what stands around it: where the rendering
of the messages before it with the generation prompt ends, and where the end of turn follows. Both are looked
for in the template's own text alone. Calls stand in that text, so where they end is seen by what changes with
their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

from mora_jax.data.conversation import Message
from mora_jax.data.templates.tracking import Located, Span, TemplateLayout, Untrackable, find_layout

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
