"""Rows to rendered text: chooses the template, and renders each row once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mora_jax.data.conversation import Conversation, Message, Passage
from mora_jax.data.formats.messages import read_message
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
        self.eos: str = tokenizer.eos_token or ""
        self.fell_back = 0
        self.unshown: Counter[str] = Counter()
        self._chose_alpaca = template is None and not has_own
        self._source = self._find()
        self._fallback = None if fallback is None else BuiltInTemplate(fallback, self.eos, self.unshown)

    def _find(self) -> ChatTemplate | BuiltInTemplate:
        if self.template == OWN:
            return ChatTemplate(JinjaTemplate(self.tokenizer), self.unshown)
        if self.template in TEMPLATES:
            return BuiltInTemplate(self.template, self.eos, self.unshown)
        if self.template.endswith(SUFFIXES) or expanded(self.template).is_file():
            return ChatTemplate(JinjaTemplate(self.tokenizer, self.template), self.unshown)
        known = ", ".join((OWN, *TEMPLATES))
        raise InputError(f"unknown template {self.template!r}: choose one of {known}, or a Jinja file")

    @property
    def program(self) -> str:
        """What decides how rows are rendered: the source of the Jinja template, or the name of a built-in one."""
        return self._source.program

    @cached_property
    def notes(self) -> list[str]:
        """What a user should be told about the template, with this tokenizer."""
        notes = []
        if self._chose_alpaca:
            notes.append("the tokenizer has no chat template: the built-in `alpaca` is used")
        if not self.eos:
            notes.append("the tokenizer has no end-of-sequence token: only the template can end an answer")
        return notes + self._source.notes + self._trial_notes()

    def _trial_notes(self) -> list[str]:
        """What is to be said about template and tokenizer together, seen on a short conversation."""
        asked = Message("user", "Hello")
        try:
            prompt = self.prompt([asked])
            answered = Rendered.join(self._pieces(Conversation((asked, Message("assistant", "Yes")))))
        except (InputError, Untrackable):
            return []  # A template that wants other roles; rows it refuses are reported as they come.
        alone, trained = tokenize([Rendered(prompt, (Piece(prompt, Segment.TEMPLATE),)), answered], self.tokenizer)
        notes = []
        length = len(alone.input_ids)
        if answered.text.startswith(prompt) and not np.array_equal(trained.input_ids[:length], alone.input_ids):
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
            if self._fallback is None:
                raise InputError(
                    f"{at(row.source)}{self._source.name} cannot be tracked, {error}; set data.fallback=chatml for"
                    " such rows, or choose a built-in template by data.template"
                ) from None
            self.fell_back += 1
            return Rendered.join(self._fallback.pieces(row), row.source)

    def _pieces(self, row: Conversation) -> Iterable[Piece]:
        if row.text is not None:
            return (Piece(row.text, Segment.ASSISTANT, 0), Piece(self.eos, Segment.END_OF_TURN, 0))
        return self._source.pieces(row)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model answers: how `render` begins if an answer is added.

        Args:
          messages: up to the turn that is to be answered.

        Returns:
          The text.
        """
        return self._source.prompt(messages)


class BuiltInTemplate:
    """A built-in template with what rows ask of it: the counterpart of `ChatTemplate`.

    Args:
      name: a key of `TEMPLATES`.
      eos: the text of the tokenizer's end-of-sequence token.
      unshown: counts rows that have `tools` or `reasoning`, which no built-in template shows.
    """

    def __init__(self, name: str, eos: str, unshown: Counter[str]):
        self.program, self.name, self.notes = name, f"the built-in template `{name}`", list[str]()
        self._template, self._eos, self._unshown = TEMPLATES[name], eos, unshown

    def pieces(self, conversation: Conversation) -> Iterable[Piece]:
        """The stretches of a conversation.

        Raises:
          InputError: it has calls of tools, which the template does not write.
        """
        if not self._template.writes_tool_calls and any(message.tool_calls for message in conversation.messages):
            raise InputError(
                f"{at(conversation.source)}{self.name} does not write tool calls;"
                " set data.template=chatml, the built-in one that does"
            )
        self._unshown["tools"] += bool(conversation.tools)
        self._unshown["reasoning"] += any(message.reasoning for message in conversation.messages)
        return self._template.pieces(conversation.messages, self._eos)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which an answer begins."""
        return self._template.prompt(messages, self._eos)


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
