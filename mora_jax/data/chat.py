"""A tokenizer's own chat template (Jinja), rendered once for each conversation and split into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jinja2

from mora_jax.data.conversation import Message
from mora_jax.data.segments import ROLE_SEGMENT, Piece, Segment
from mora_jax.data.tracking import Layout, Span, Untrackable, find_layout, match_layout, stand_in, trace
from mora_jax.errors import InputError

_MAX_LAYOUTS = 4096


class ChatTemplate:
    """Renders conversations with `tokenizer.chat_template` and says what each character is.

    Args:
      tokenizer: a `transformers` tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._layouts: dict[tuple[Any, ...], Layout] = {}

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
        try:
            spans = self._locate(roles, contents, text, source)
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
                f"the tokenizer's chat template has a syntax error, line {error.lineno}: {error}"
            ) from None
        except (jinja2.TemplateError, TypeError) as error:
            raise InputError(
                f"{_at(source)}the tokenizer's chat template refuses the roles {', '.join(roles)}: {error}"
            ) from None

    def _locate(self, roles: list[str], contents: list[str], text: str, source: str) -> list[Span]:
        def render(stand_ins: Sequence[str]) -> str:
            return self._render(roles, stand_ins, False, source)

        # Templates may leave out a turn that says nothing, so blank contents are tried as they are too.
        blank = [not content.strip() for content in contents]
        for keep in [[False] * len(roles), blank] if any(blank) else [blank]:
            key = (*roles, *(content for content, kept in zip(contents, keep, strict=True) if kept), *keep)
            layout = self._layouts.get(key)
            # A layout that does not fit may be out of date (templates can write the time), so it is made anew.
            for fresh in (False, True) if layout else (True,):
                if fresh:
                    if len(self._layouts) >= _MAX_LAYOUTS:
                        self._layouts.clear()
                    layout = self._layouts[key] = find_layout(render, contents, keep)
                assert layout is not None
                spans = match_layout(layout, contents, text)
                if spans is not None:
                    return spans
        return trace(render, contents, text)

    @cached_property
    def closing(self) -> str:
        """What the template writes after the last answer, up to and with its end-of-turn token; may be empty."""
        roles = ["user", "assistant"]
        after = self._render(roles, [stand_in(0), stand_in(1)], False, "").rpartition(stand_in(1))[2]
        tokenizer = self._tokenizer
        special = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
        found = [(after.index(token), len(token)) for token in special if token and token in after]
        if not found:
            return after.rstrip()
        start, length = min(found, key=lambda place: (place[0], -place[1]))
        return after[: start + length]

    def _pieces(self, spans: list[Span], roles: Sequence[str], text: str) -> list[Piece]:
        pieces, at = [], 0
        last_of = {span.message: index for index, span in enumerate(spans)}
        for index, span in enumerate(spans):
            pieces.append(Piece(text[at : span.start], Segment.TEMPLATE))
            pieces.append(Piece(text[span.start : span.stop], ROLE_SEGMENT[roles[span.message]]))
            at = span.stop
            if roles[span.message] == "assistant" and last_of[span.message] == index:
                end = self._end_of_turn(text, at)
                pieces.append(Piece(text[at:end], Segment.END_OF_TURN))
                at = end
        rest = text[at:]
        eos = self._tokenizer.eos_token
        if roles and roles[-1] == "assistant" and not self.closing and eos:
            pieces.append(Piece(rest + eos, Segment.END_OF_TURN))
        else:
            pieces.append(Piece(rest, Segment.TEMPLATE))
        return pieces

    def _end_of_turn(self, text: str, at: int) -> int:
        """Where the closing that begins at `at` ends; `at` itself if there is none."""
        if self.closing and text.startswith(self.closing, at):
            return at + len(self.closing)
        # Where a traced answer's outer space was left to the template, the closing comes after it.
        bare = self.closing.lstrip()
        start = at + len(text[at:]) - len(text[at:].lstrip())
        return start + len(bare) if bare and text.startswith(bare, start) else at


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
