"""What a chat template writes around a message, seen on short conversations of stand-ins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mora_jax.data.templates.jinja import JinjaTemplate
from mora_jax.data.templates.tracking import Untrackable, stand_in
from mora_jax.errors import InputError


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around messages.

    Attributes:
      lead: between the end of the generation prompt and the answer (nearly always nothing); None if the
        generation prompt is not how the rendering of the answered conversation begins.
      closing: after the last answer, up to and with its end-of-turn token; empty if there is none.
      inner_closing: the same after earlier answers, where it is the one that closes questions too.
      asked_closing: after a question; empty if nothing but space closes it.
      header: before a question that is not the first; empty if it is not known.
      rewrites: whether a turn is rendered in another way when more turns follow.
      cuts_thoughts: whether what an answer says before `</think>` is left out when more turns follow.
    """

    lead: str | None
    closing: str
    inner_closing: str = ""
    asked_closing: str = ""
    header: str = ""
    rewrites: bool = False
    cuts_thoughts: bool = False

    @property
    def answer_closings(self) -> tuple[str, ...]:
        """How an answer may end."""
        return tuple(closing for closing in (self.closing, self.inner_closing) if closing)


def find_frame(template: JinjaTemplate) -> Frame:
    """Looks at what the template writes around a question and an answer.

    Raises:
      InputError: if the template refuses a question and an answer, alone and after a system message.
      Untrackable: if it does not show them as they are.
    """
    marks = _Marks(template.tokenizer)
    try:
        return _find([], template, marks)
    except InputError as refusal:
        try:
            return _find(["system"], template, marks)  # A template may demand one.
        except InputError:
            raise refusal from None


def _find(opening: list[str], template: JinjaTemplate, marks: _Marks) -> Frame:
    def render(roles: list[str], words: list[str], prompt: bool = False) -> str:
        turns = [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]
        return template.render(turns, prompt=prompt)

    roles = [*opening, "user", "assistant"]
    words = [stand_in(index) for index in range(len(roles) + 2)]
    question, answer = words[len(opening) : len(roles)]
    asked = words[: len(roles) - 1]
    prompt = render(roles[:-1], asked, prompt=True)
    whole = render(roles, words[: len(roles)])
    if question not in whole or answer not in whole:
        raise Untrackable("its output depends on the words of the messages")
    before, _, after = whole.rpartition(answer)
    lead = before.removeprefix(prompt) if before.startswith(prompt) else None
    closing = marks.closing(after)
    try:
        asked_closing = marks.closing(render(roles[:-1], asked).rpartition(question)[2])
    except InputError:  # The template wants every question answered.
        asked_closing = ""
    more = [*roles, "user", "assistant"]
    try:
        longer = render(more, words)
    except InputError:  # The template takes one question only.
        return Frame(lead, closing, asked_closing=asked_closing)
    turn, _, rest = longer.partition(question)[2].partition(answer)
    rest = rest.partition(words[-2])[0]
    inner = marks.first(rest)
    if not turn.startswith(inner):
        inner = ""
    known = next((text for text in (closing, inner) if text and rest.startswith(text)), "")
    return Frame(
        lead,
        closing,
        inner,
        asked_closing,
        header=rest[len(known) :],
        rewrites=not longer.startswith(before + answer),
        cuts_thoughts=_cuts_thoughts(more, words, answer, template),
    )


def _cuts_thoughts(roles: list[str], words: list[str], answer: str, template: JinjaTemplate) -> bool:
    """Whether the thoughts of an earlier answer are shown while it is the last, and later are not."""
    thought = stand_in(len(words))
    turns = [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]
    turns[len(roles) - 3]["content"] = f"<think>\n{thought}\n</think>\n\n{answer}"
    try:
        alone = template.render(turns[:-2])
        followed = template.render(turns)
    except InputError:
        return False
    return thought in alone and thought not in followed


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokens that are no ordinary text."""
    marked = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys(token for token in (*tokenizer.all_special_tokens, *marked) if token))


class _Marks:
    """Finds a tokenizer's special and added tokens in a template's own text."""

    def __init__(self, tokenizer: Any):
        self._tokens = {*special_tokens(tokenizer), *tokenizer.get_added_vocab()}

    def first(self, text: str) -> str:
        """The text up to and with its first such token; empty if it has none."""
        found = [(text.index(token), -len(token)) for token in self._tokens if token in text]
        start, length = min(found, default=(0, 0))
        return text[: start - length]

    def closing(self, after: str) -> str:
        """The text up to and with its first such token; without outer space if it has none."""
        return self.first(after) or after.rstrip()
