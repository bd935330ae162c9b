"""A chat template written in Jinja, the tokenizer's own or a user's file, as something that renders text.

What it writes around a message is seen on short conversations of stand-ins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from mora_jax.data.templates.tracking import Untrackable, stand_in
from mora_jax.errors import InputError
from mora_jax.paths import expanded

#: Files with one of these endings are Jinja templates, also where there is no such file.
SUFFIXES = (".jinja", ".jinja2", ".j2")
#: What running somebody's template may raise.
REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class JinjaTemplate:
    """Renders messages as `tokenizer.apply_chat_template` does.

    Args:
      tokenizer: a `transformers` tokenizer.
      file: a user's template; None for the tokenizer's own.

    Attributes:
      tokenizer: as given.
      name: what to call it in messages to the user.
      program: the template's source.

    Raises:
      InputError: for a file that cannot be read or has a syntax error.
    """

    def __init__(self, tokenizer: Any, file: str | None = None):
        self.tokenizer = tokenizer
        self.name = "the tokenizer's chat template" if file is None else f"the chat template {file}"
        self._program = None if file is None else _read(file)
        self.program = str(tokenizer.chat_template) if self._program is None else self._program
        if file is None:
            return
        try:
            self._apply([{"role": "user", "content": "a"}], (), False)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{file}, line {error.lineno}: not a Jinja template: {error.message}") from None
        except REFUSALS:
            pass  # It may want other roles: rows that it refuses are reported as they come.

    def _apply(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=list(tools) or None,
            chat_template=self._program,
            tokenize=False,
            add_generation_prompt=prompt,
        )

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        prompt: bool = False,
        source: str = "",
    ) -> str:
        """The text of the messages; with `prompt` it ends where the answer begins.

        Args:
          messages: as `apply_chat_template` takes them.
          tools: descriptions of the tools that the assistant may call.
          prompt: whether an answer is to follow.
          source: file and row, for messages to the user.

        Raises:
          InputError: if the template refuses them, or has a syntax error.
        """
        try:
            return self._apply(messages, tools, prompt)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{self.name} has a syntax error, line {error.lineno}: {error.message}") from None
        except REFUSALS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(f"{at(source)}{self.name} refuses the roles {roles}: {reason}") from None


def _read(file: str) -> str:
    try:
        return expanded(file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}: save the chat template as UTF-8") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"cannot read the chat template {file}: {reason}") from None


def at(source: str) -> str:
    """The beginning of a message about a row."""
    return f"{source}: " if source else ""


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
    try:
        return _find([], template)
    except InputError as refusal:
        try:
            return _find(["system"], template)  # A template may demand one.
        except InputError:
            raise refusal from None


def _find(opening: list[str], template: JinjaTemplate) -> Frame:
    tokens = {*special_tokens(template.tokenizer), *template.tokenizer.get_added_vocab()}

    def first_end(text: str) -> str:
        """The text up to and with its first special or added token; empty if it has none."""
        places = [(text.index(token), -len(token)) for token in tokens if token in text]
        start, length = min(places, default=(0, 0))
        return text[: start - length]

    def closing_of(after: str) -> str:
        """The same; without outer space if it has no such token."""
        return first_end(after) or after.rstrip()

    def render(roles: list[str], texts: list[str], prompt: bool = False) -> str:
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        return template.render(turns, prompt=prompt)

    roles = [*opening, "user", "assistant"]
    texts = [stand_in(index) for index in range(len(roles) + 2)]
    question, answer = texts[len(opening) : len(roles)]
    asked = texts[: len(roles) - 1]
    prompt = render(roles[:-1], asked, prompt=True)
    answered = render(roles, texts[: len(roles)])
    if question not in answered or answer not in answered:
        raise Untrackable("its output depends on the words of the messages")
    before, _, after = answered.rpartition(answer)
    lead = before.removeprefix(prompt) if before.startswith(prompt) else None
    closing = closing_of(after)
    try:
        asked_closing = closing_of(render(roles[:-1], asked).rpartition(question)[2])
    except InputError:  # The template wants every question answered.
        asked_closing = ""
    more = [*roles, "user", "assistant"]
    try:
        longer = render(more, texts)
    except InputError:  # The template takes one question only.
        return Frame(lead, closing, asked_closing=asked_closing)
    turn, _, rest = longer.partition(question)[2].partition(answer)
    rest = rest.partition(texts[-2])[0]
    inner = first_end(rest)
    if not turn.startswith(inner):
        inner = ""
    known = next((text for text in (closing, inner) if text and rest.startswith(text)), "")
    # Whether the thoughts of an earlier answer are shown while it is the last, and later are not.
    thought = stand_in(len(texts))
    thinking = [f"<think>\n{thought}\n</think>\n\n{text}" if text == answer else text for text in texts]
    try:
        cuts_thoughts = thought in render(roles, thinking[: len(roles)]) and thought not in render(more, thinking)
    except InputError:
        cuts_thoughts = False
    return Frame(
        lead,
        closing,
        inner,
        asked_closing,
        header=rest[len(known) :],
        rewrites=not longer.startswith(before + answer),
        cuts_thoughts=cuts_thoughts,
    )


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokens that are no ordinary text."""
    marked = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys(token for token in (*tokenizer.all_special_tokens, *marked) if token))
