"""A conversation that goes on: its history, and the models that answer in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mora_jax.data.templates.render import render_prompt
from mora_jax.errors import InputError
from mora_jax.evaluation.chat import decode_stream, find_stop_ids
from mora_jax.evaluation.generate import GREEDY, Generator, Sampling
from mora_jax.evaluation.prompts import with_system
from mora_jax.models.decoder import Decoder


class ChatSession:
    """A conversation with one of several models that share a tokenizer.

    Args:
        models: by name; the first one answers until another is chosen.
        tokenizer: theirs.
        system: a message before the conversation.
        max_new_tokens: the longest answer.
        sampling: how tokens are drawn; the draws of an answer belong to its number in the session.
        template: as for `mora_jax.data.Renderer`.

    Attributes:
        messages: what was said so far, without the system message.
        speaker: the name of the model that answers.
        left_out: messages at the beginning that the last prompt had no room for.
    """

    def __init__(
        self,
        models: Mapping[str, Decoder],
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        template: str | None = None,
    ) -> None:
        self.models, self.tokenizer, self.template = dict(models), tokenizer, template
        self.messages: list[dict[str, Any]] = []
        self.left_out = 0
        self._system, self._max_new_tokens, self._sampling = system, max_new_tokens, sampling
        self._answers = 0
        self.speaker = next(iter(self.models))
        self.switch(self.speaker)

    def switch(self, name: str) -> None:
        """Lets another model answer from here on; the conversation stays.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self.models:
            raise InputError(f"there is no adapter {name!r}; there are {', '.join(self.models)}")
        self.speaker, model = name, self.models[name]
        self._generator = Generator(model, find_stop_ids(model, self.tokenizer, self.template), self._sampling)

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages.clear()

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer to a message, piece by piece.

        The pieces that were yielded when it ends, or is closed, belong to the conversation.

        Raises:
            InputError: the message alone leaves no room in the context; it is then no part of the conversation.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompt()
            tokens = self._generator.stream(prompt, self._max_new_tokens, self._answers)
        except InputError:
            del self.messages[-1]
            raise
        self._answers += 1
        pieces: list[str] = []
        try:
            for piece in decode_stream(self.tokenizer, tokens):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _prompt(self) -> Any:
        """The tokens of the conversation, without as many turns at its beginning as leave room for an answer."""
        context = self._generator.model.config.max_positions
        room = min(self._max_new_tokens, context // 2)
        for start in range(0, len(self.messages), 2):
            messages = with_system(self.messages[start:], self._system)
            ids = render_prompt(self.tokenizer, messages, self.template).input_ids
            self.left_out = start
            if len(ids) + room <= context:
                return ids
        if len(ids) >= context:
            raise InputError(f"the message has {len(ids)} tokens, the model's context {context}; shorten it")
        return ids
