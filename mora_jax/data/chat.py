"""A tokenizer's own chat template (Jinja), rendered once for each conversation and split into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2

from mora_jax.data.conversation import Message
from mora_jax.data.layout import stand_in
from mora_jax.data.segments import ROLE_SEGMENT, Piece, Segment
from mora_jax.data.spans import Span, Untrackable
from mora_jax.data.tracking import Tracker
from mora_jax.errors import InputError


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around an answer.

    Attributes:
      lead: between the end of the generation prompt and the answer (nearly always nothing); None if the
        generation prompt is not how the rendering of the answered conversation begins.
      closing: after the last answer, up to and with its end-of-turn token; empty if there is none.
      inner_closing: the same after earlier answers, where it is the one that closes questions too.
    """

    lead: str | None
    closing: str
    inner_closing: str


class ChatTemplate:
    """Renders conversations with `tokenizer.chat_template` and says what each character is.

    Args:
      tokenizer: a `transformers` tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._tracker = Tracker()

    def render(self, messages: Sequence[Message], *, prompt: bool = False, source: str = "") -> str:
        """The text of the messages; with `prompt` it ends where the answer begins."""
        return self._render([m.role for m in messages], [m.text for m in messages], prompt, source)

    def pieces(self, messages: Sequence[Message], source: str = "") -> list[Piece]:
        """The stretches of a whole conversation.

        Raises:
          InputError: if the template refuses the messages, or cannot be tracked.
        """
        roles = [message.role for message in messages]
        contents = [message.text for message in messages]
        text = self._render(roles, contents, False, source)

        def render(stand_ins: Sequence[str]) -> str:
            return self._render(roles, stand_ins, False, source)

        try:
            program = str(self._tokenizer.chat_template)
            spans = self._tracker.locate(render, roles, contents, text, program)
            _check(spans, roles, contents)
        except Untrackable as error:
            raise InputError(
                f"{_at(source)}the tokenizer's chat template cannot be tracked, {error};"
                " choose a built-in one by data.template"
            ) from None
        return self._pieces(spans, roles, text)

    def _render(self, roles: Sequence[str], contents: Sequence[str], prompt: bool, source: str) -> str:
        turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"the tokenizer's chat template has a syntax error, line {error.lineno}: {error.message}"
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{_at(source)}the tokenizer's chat template refuses the roles {', '.join(roles)}: {reason}"
            ) from None

    @cached_property
    def frame(self) -> Frame:
        """What the template writes around an answer, seen on a short conversation of stand-ins."""
        try:
            return self._frame([])
        except InputError as refusal:
            try:
                return self._frame(["system"])  # A template may demand one.
            except InputError:
                raise refusal from None

    def _frame(self, opening: list[str]) -> Frame:
        roles = [*opening, "user", "assistant"]
        words = [stand_in(index) for index in range(len(roles) + 2)]
        question, answer = words[len(opening) : len(roles)]
        prompt = self._render(roles[:-1], words[: len(roles) - 1], True, "")
        whole = self._render(roles, words[: len(roles)], False, "")
        before, _, after = whole.rpartition(answer)
        lead = before.removeprefix(prompt) if before.startswith(prompt) else None
        try:
            longer = self._render([*roles, "user", "assistant"], words, False, "")
        except InputError:  # The template takes one question only.
            return Frame(lead, self._closing(after), "")
        turn, _, rest = longer.partition(question)[2].partition(answer)
        inner = rest.partition(words[-2])[0]
        inner = inner[: self._first_special(inner)]
        return Frame(lead, self._closing(after), inner if turn.startswith(inner) else "")

    def _first_special(self, text: str) -> int:
        """Where the first special token in a text ends; 0 if there is none."""
        special = {*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()}
        found = [(text.index(token), -len(token)) for token in special if token and token in text]
        start, length = min(found, default=(0, 0))
        return start - length

    def _closing(self, after: str) -> str:
        """The text up to and with its first special token; without outer space if it has none."""
        return after[: self._first_special(after)] or after.rstrip()

    @property
    def notes(self) -> list[str]:
        """What a user should know about the template."""
        lead = self.frame.lead
        if lead is None:
            return ["the chat template's generation prompt is not how it begins an answer in training"]
        if lead.strip():
            return [
                f"the chat template writes {lead!r} between its generation prompt and an answer: not trained"
            ]
        return []

    def _pieces(self, spans: list[Span], roles: Sequence[str], text: str) -> list[Piece]:
        pieces, at = [], 0
        lead = self.frame.lead if self.frame.lead and not self.frame.lead.strip() else ""
        first_of: dict[int, int] = {}
        last_of: dict[int, int] = {}
        for index, span in enumerate(spans):
            first_of.setdefault(span.message, index)
            last_of[span.message] = index
        for index, span in enumerate(spans):
            start, answers = span.start, roles[span.message] == "assistant"
            if answers and lead and first_of[span.message] == index and text[at:start].endswith(lead):
                start -= len(lead)  # Space after the generation prompt: the model has to produce it.
            pieces.append(Piece(text[at:start], Segment.TEMPLATE))
            pieces.append(Piece(text[start : span.stop], ROLE_SEGMENT[roles[span.message]]))
            at = span.stop
            if answers and last_of[span.message] == index:
                end = self._end_of_turn(text, at)
                pieces.append(Piece(text[at:end], Segment.END_OF_TURN))
                at = end
        rest = text[at:]
        eos = self._tokenizer.eos_token
        if roles[-1:] == ["assistant"] and not self.frame.closing and eos:
            pieces.append(Piece(rest + eos, Segment.END_OF_TURN))
        else:
            pieces.append(Piece(rest, Segment.TEMPLATE))
        return pieces

    def _end_of_turn(self, text: str, at: int) -> int:
        """Where the closing that begins at `at` ends; `at` itself if there is none."""
        for closing in (self.frame.closing, self.frame.inner_closing):
            if closing and text.startswith(closing, at):
                return at + len(closing)
            # Where a traced answer's outer space was left to the template, the closing comes after it.
            bare = closing.lstrip()
            start = len(text) - len(text[at:].lstrip())
            if bare and text.startswith(bare, start):
                return start + len(bare)
        return at


def _check(spans: list[Span], roles: Sequence[str], contents: Sequence[str]) -> None:
    """Refuses renderings in which an answer is missing, or comes twice."""
    for index, (role, content) in enumerate(zip(roles, contents, strict=True)):
        if role != "assistant":
            continue
        own = [span for span in spans if span.message == index]
        if not own and content.strip():
            raise Untrackable(f"it does not show the words of message {index + 1} ({role})")
        if sum(span.stop - span.start for span in own) > len(content):
            raise Untrackable(f"it repeats message {index + 1} ({role})")


def _at(source: str) -> str:
    return f"{source}: " if source else ""
