"""Rows to rendered text: chooses the template, and renders each row once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mora_jax.data.conversation import Conversation, Message, Passage
from mora_jax.data.formats.registry import read_message
from mora_jax.data.segments import Piece, Rendered, Segment
from mora_jax.data.templates.builtin import TEMPLATES
from mora_jax.data.templates.chat import ChatTemplate
from mora_jax.data.templates.jinja import SUFFIXES, JinjaTemplate, at
from mora_jax.data.templates.tracking import Untrackable
from mora_jax.data.tokens.tokenize import tokenize
from mora_jax.errors import InputError
from mora_jax.paths import expanded

#: The name under which a user may ask for the tokenizer's own template, which is also the default.
OWN = "tokenizer"
#: Turns are numbered in 16 bits.
_MAX_TURNS = np.iinfo(np.int16).max


class Renderer:
    """Renders rows for one tokenizer.

    Args:
      tokenizer: a fast `transformers` tokenizer.
      template: a name in `TEMPLATES`, `tokenizer` for its own chat template, the path of a Jinja file, or None:
        its own if it has one, else `alpaca`. A name wins over a file.
      fallback: a name in `TEMPLATES`, for rows in which a Jinja template's output cannot be tracked; None:
        they are refused.

    Attributes:
      tokenizer: as given.
      template: the name or the path of the template in use.
      eos: the text of the tokenizer's end-of-sequence token; empty if it has none.
      fell_back: how many rows were rendered with `fallback`.
      unshown: how many rows have `tools` or `reasoning` that the template does not show, by these names.

    Raises:
      InputError: for an unknown name, a file that is no template, or `tokenizer` where it has no chat template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, fallback: str | None = None):
        has_own = bool(tokenizer.chat_template)
        if template == OWN and not has_own:
            known = ", ".join(TEMPLATES)
            raise InputError(f"the tokenizer has no chat template: set data.template to one of {known}")
        if fallback is not None and fallback not in TEMPLATES:
            raise InputError(f"unknown template {fallback!r} to fall back to: choose one of {', '.join(TEMPLATES)}")
        self.tokenizer = tokenizer
        self.template = template or (OWN if has_own else "alpaca")
        self.fallback = fallback
        self.eos: str = tokenizer.eos_token or ""
        self.fell_back = 0
        self.unshown: Counter[str] = Counter()
        self._chose_alpaca = template is None and not has_own
        self._chat = self._own_or_file()

    def _own_or_file(self) -> ChatTemplate | None:
        """The Jinja template, or None for a built-in one."""
        if self.template == OWN:
            return ChatTemplate(JinjaTemplate(self.tokenizer), self.unshown)
        if self.template in TEMPLATES:
            return None
        if self.template.endswith(SUFFIXES) or expanded(self.template).is_file():
            return ChatTemplate(JinjaTemplate(self.tokenizer, self.template), self.unshown)
        known = ", ".join((OWN, *TEMPLATES))
        raise InputError(f"unknown template {self.template!r}: choose one of {known}, or a Jinja file")

    @property
    def program(self) -> str:
        """What decides how rows are rendered: the source of the Jinja template, or the name of a built-in one."""
        return self.template if self._chat is None else self._chat.program

    @cached_property
    def notes(self) -> list[str]:
        """What a user should be told about the template, with this tokenizer."""
        notes = []
        if self._chose_alpaca:
            notes.append("the tokenizer has no chat template: the built-in `alpaca` is used")
        if not self.eos:
            notes.append("the tokenizer has no end-of-sequence token: only the template can end an answer")
        if self._chat is not None:
            notes += self._chat.notes
        return notes + self._trial_notes()

    def _trial_notes(self) -> list[str]:
        """What is to be said about template and tokenizer together, seen on a short conversation."""
        asked = Message("user", "Hello")
        try:
            prompt = self.prompt([asked])
            whole = Rendered.join(self._pieces(Conversation((asked, Message("assistant", "Yes")))))
        except (InputError, Untrackable):
            return []  # A template that wants other roles; rows it refuses are reported as they come.
        alone, trained = tokenize([Rendered(prompt, (Piece(prompt, Segment.TEMPLATE),)), whole], self.tokenizer)
        notes = []
        length = len(alone.input_ids)
        if whole.text.startswith(prompt) and not np.array_equal(trained.input_ids[:length], alone.input_ids):
            notes.append("the tokenizer splits the end of a prompt in another way where no answer follows it")
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        ends = trained.input_ids[trained.segments == Segment.END_OF_TURN]
        if self.eos and special.isdisjoint(ends.tolist()):
            notes.append("the template ends answers with plain text, at which generation does not stop")
        return notes

    def render(self, row: Conversation | Passage) -> Rendered:
        """Renders a row: a conversation, plain text with an end-of-sequence token after it, or a passage as it is.

        Args:
          row: as `load_rows` gives it.

        Returns:
          The text, and the segment of each stretch of it.

        Raises:
          InputError: if the template refuses the messages, or what it makes of them cannot be tracked.
        """
        turns = len(row.parts if isinstance(row, Passage) else row.messages)
        if turns > _MAX_TURNS:
            raise InputError(f"{at(row.source)}{turns} turns are too many: split the row, {_MAX_TURNS} are the most")
        if isinstance(row, Passage):
            parts = enumerate(row.parts)
            return Rendered.join(
                (Piece(text, Segment.ASSISTANT if weight > 0 else Segment.USER, i) for i, (text, weight) in parts),
                row.source,
            )
        try:
            return Rendered.join(self._pieces(row), row.source)
        except Untrackable as error:
            if self.fallback is None:
                raise InputError(
                    f"{at(row.source)}{self._template_name} cannot be tracked, {error}; set data.fallback=chatml for"
                    " such rows, or choose a built-in template by data.template"
                ) from None
            self.fell_back += 1
            return Rendered.join(self._built_in(self.fallback, row), row.source)

    @property
    def _template_name(self) -> str:
        return self._chat.name if self._chat is not None else f"the built-in template `{self.template}`"

    def _pieces(self, row: Conversation) -> Iterable[Piece]:
        if row.text is not None:
            return (Piece(row.text, Segment.ASSISTANT, 0), Piece(self.eos, Segment.END_OF_TURN, 0))
        if self._chat is not None:
            return self._chat.pieces(row)
        return self._built_in(self.template, row)

    def _built_in(self, name: str, row: Conversation) -> Iterable[Piece]:
        template = TEMPLATES[name]
        if not template.writes_tool_calls and any(message.tool_calls for message in row.messages):
            raise InputError(
                f"{at(row.source)}the built-in template `{name}` does not write tool calls;"
                " set data.template=chatml, the built-in one that does"
            )
        self.unshown["tools"] += bool(row.tools)
        self.unshown["reasoning"] += any(message.reasoning for message in row.messages)
        return template.pieces(row.messages, self.eos)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model answers: how `render` begins if an answer is added.

        Args:
          messages: up to the turn that is to be answered.

        Returns:
          The text.
        """
        if self._chat is not None:
            return self._chat.prompt(messages)
        pieces = TEMPLATES[self.template].pieces(messages, self.eos, prompt=True)
        return "".join(piece.text for piece in pieces)


@dataclass(frozen=True)
class Prompt:
    """What to feed a model so that it answers.

    Attributes:
      text: the rendered prompt.
      input_ids: `[T]` int32, with the tokenizer's beginning-of-sequence token where training has it.
    """

    text: str
    input_ids: np.ndarray


def render_prompt(
    tokenizer: Any,
    messages: str | Iterable[Message | Mapping[str, str]],
    template: str | None = None,
) -> Prompt:
    """Renders messages up to the point where the assistant's answer begins.

    Args:
      tokenizer: a fast `transformers` tokenizer.
      messages: one user's text, or messages (also as `{"role": ..., "content": ...}`).
      template: as for `Renderer`.

    Raises:
      InputError: for messages that cannot be used.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    turns = [
        item if isinstance(item, Message) else read_message(dict(item), f"messages[{index}]", "prompt")
        for index, item in enumerate(messages)
    ]
    text = Renderer(tokenizer, template).prompt(turns)
    return Prompt(text, tokenize([Rendered(text, (Piece(text, Segment.TEMPLATE),))], tokenizer)[0].input_ids)
