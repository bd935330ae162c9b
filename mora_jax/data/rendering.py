"""Conversations to rendered text: chooses the template, and renders each conversation once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mora_jax.data.chat import ChatTemplate
from mora_jax.data.conversation import Conversation, Message
from mora_jax.data.formats import read_message
from mora_jax.data.segments import Piece, Rendered, Segment
from mora_jax.data.templates import TEMPLATES
from mora_jax.data.tokens import tokenize
from mora_jax.errors import InputError

#: The names under which a user may ask for the tokenizer's own template, which is also the default.
OWN = "tokenizer"


class Renderer:
    """Renders conversations for one tokenizer.

    Args:
      tokenizer: a fast `transformers` tokenizer.
      template: a name in `TEMPLATES`, `tokenizer` for its own chat template, or None: its own if it has one,
        else `alpaca`.

    Attributes:
      tokenizer: as given.
      template: the name of the template in use.
      eos: the text of the tokenizer's end-of-sequence token; empty if it has none.

    Raises:
      InputError: for an unknown name, or `tokenizer` where it has no chat template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        has_own = bool(tokenizer.chat_template)
        if template is not None and template != OWN and template not in TEMPLATES:
            raise InputError(f"unknown template {template!r}: choose one of {', '.join((OWN, *TEMPLATES))}")
        if template == OWN and not has_own:
            known = ", ".join(TEMPLATES)
            raise InputError(f"the tokenizer has no chat template: set data.template to one of {known}")
        self.tokenizer = tokenizer
        self.template = template or (OWN if has_own else "alpaca")
        self.eos: str = tokenizer.eos_token or ""
        self._fell_back = template is None and not has_own
        self._chat = ChatTemplate(tokenizer) if self.template == OWN else None

    @cached_property
    def notes(self) -> list[str]:
        """What a user should be told about the template, with this tokenizer."""
        notes = []
        if self._fell_back:
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
            whole = self.render(Conversation((asked, Message("assistant", "Yes"))))
        except InputError:
            return []  # A template that wants other roles; rows it refuses are reported as they come.
        alone, trained = tokenize(
            [Rendered(prompt, (Piece(prompt, Segment.TEMPLATE),)), whole], self.tokenizer
        )
        notes = []
        length = len(alone.input_ids)
        if whole.text.startswith(prompt) and not np.array_equal(trained.input_ids[:length], alone.input_ids):
            notes.append("the tokenizer splits the end of a prompt in another way where no answer follows it")
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        ends = trained.input_ids[trained.segments == Segment.END_OF_TURN]
        if self.eos and special.isdisjoint(ends.tolist()):
            notes.append("the template ends answers with plain text, at which generation does not stop")
        return notes

    def render(self, conversation: Conversation) -> Rendered:
        """Renders a whole conversation, or plain text with an end-of-sequence token after it."""
        if conversation.text is not None:
            pieces = [Piece(conversation.text, Segment.ASSISTANT), Piece(self.eos, Segment.END_OF_TURN)]
        elif self._chat is not None:
            pieces = self._chat.pieces(conversation.messages, conversation.source)
        else:
            pieces = list(TEMPLATES[self.template].pieces(conversation.messages, self.eos))
        return Rendered.join(pieces, conversation.source)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model answers: how `render` begins if an answer is added."""
        if self._chat is not None:
            return self._chat.render(messages, prompt=True)
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
