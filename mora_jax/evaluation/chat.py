"""Prompts in, text out: the chat template, the tokens that end an answer, decoding, conversations."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from mora_jax.data.conversation import Conversation, Message
from mora_jax.data.read.files import decode, read_lines
from mora_jax.data.segments import Segment
from mora_jax.data.templates.render import Renderer, render_prompt
from mora_jax.data.tokens.tokenize import tokenize
from mora_jax.errors import InputError
from mora_jax.evaluation.generate import GREEDY, Generator, Sampling
from mora_jax.models.decoder import Decoder
from mora_jax.models.init import read_json

REPLACEMENT = "\ufffd"
Chat = str | Sequence[Message | Mapping[str, str]]


def find_stop_ids(model: Decoder, tokenizer: Any, template: str | None = None) -> frozenset[int]:
    """Returns the tokens that end an answer in a chat.

    These are those of `stated_stop_ids`, and the special token that the chat template writes after an answer.

    Args:
        model: as for `stated_stop_ids`.
        tokenizer: a transformers tokenizer.
        template: as for `mora_jax.data.Renderer`.

    Raises:
        InputError: a file's `eos_token_id` is no token id.
    """
    turns = (Message("user", "Question"), Message("assistant", "Answer"))
    tokens = tokenize([Renderer(tokenizer, template).render(Conversation(turns))], tokenizer)[0]
    closing = tokens.input_ids[tokens.segments == Segment.END_OF_TURN]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return stated_stop_ids(model, tokenizer) | {int(token) for token in closing if token in special}


def stated_stop_ids(model: Decoder, tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that end a text: the tokenizer's eos_token, those of config.json and generation_config.json.

    Args:
        model: its config holds the content of config.json, its folder may hold generation_config.json.
        tokenizer: a transformers tokenizer.

    Raises:
        InputError: a file's `eos_token_id` is no token id.
    """
    stop_ids: set[int] = set()
    sources = {"the tokenizer": {"eos_token_id": tokenizer.eos_token_id}, "config.json": model.config.hf_config}
    if model.folder is not None and (path := Path(model.folder) / "generation_config.json").exists():
        sources[str(path)] = read_json(path)
    for name, source in sources.items():
        stated = source.get("eos_token_id")
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise InputError(f"{name}: eos_token_id must be a token id or a list of them, found {reprlib.repr(stated)}")
        # Others are never made: -1 stands for none in some files.
        stop_ids.update(token for token in ids if 0 <= token < model.config.vocab_size)
    return frozenset(stop_ids)


def stream_text(
    model: Decoder,
    tokenizer: Any,
    prompt: Chat,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    template: str | None = None,
) -> Iterator[str]:
    """Yields the answer to a prompt, piece by piece.

    Args:
        model: a decoder, with or without adapters.
        tokenizer: its transformers tokenizer.
        prompt: a user's text, or messages.
        max_new_tokens: at most so many tokens are made.
        sampling: how tokens are drawn.
        template: as for `mora_jax.data.Renderer`.
    """
    prompt_ids = render_prompt(tokenizer, prompt, template).input_ids
    generator = Generator(model, find_stop_ids(model, tokenizer, template), sampling)
    return decode_stream(tokenizer, generator.stream(prompt_ids, max_new_tokens))


def generate_batch(
    model: Decoder,
    tokenizer: Any,
    prompts: Sequence[Chat],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    sampling: Sampling = GREEDY,
    template: str | None = None,
    adapter_ids: Sequence[int] | np.ndarray | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Returns the answers to many prompts, in their order.

    Batches are made of prompts of similar length, padded to few shapes, so few functions are compiled.

    Args:
        model: a decoder, with or without adapters.
        tokenizer: the model's.
        prompts: a user's text each, or messages.
        max_new_tokens: the longest answer in tokens.
        batch_size: prompts that are answered at once.
        sampling: how tokens are drawn; greedy unless given.
        template: as for `stream_text`.
        adapter_ids: the adapter of each prompt, int `[N]`, as for `Generator.batch`; None for the active one.
        numbers: int `[N]`, to which the prompts' draws belong; None: their places in `prompts`. Equal ones let
            several adapters answer a prompt with the same draws.
        progress: called with (prompts done, all prompts) after each batch.

    Returns:
        The answers, without special tokens.
    """
    generator = Generator(model, find_stop_ids(model, tokenizer, template), sampling)
    ids = [render_prompt(tokenizer, prompt, template).input_ids for prompt in prompts]
    answers = complete_batch(
        generator,
        ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        adapter_ids=adapter_ids,
        numbers=numbers,
        progress=progress,
    )
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]


def complete_batch(
    generator: Generator,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    adapter_ids: Sequence[int] | np.ndarray | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
    ended: Callable[[np.ndarray], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """Returns what a model writes after many prompts of tokens, in their order.

    Batches are made of prompts of similar length, padded to few shapes, so few functions are compiled.

    Args:
        generator: the model, with the tokens that end a text.
        prompts: int `[T_i]` each.
        max_new_tokens: at most so many are made for each.
        batch_size: prompts that are continued at once.
        adapter_ids: as for `generate_batch`.
        numbers: the requests' numbers, to which their draws belong; None: their places in `prompts`.
        ended: as for `Generator.batch`.
        progress: called with (prompts done, all prompts) after each batch.

    Returns:
        int32 `[N_i]` each, without the token that ends it.
    """
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    numbers = np.arange(len(prompts)) if numbers is None else np.asarray(numbers)
    answers: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # The last batch is filled up with its own last prompt, to keep the compiled shape.
        filled = [*rows, *[rows[-1]] * (min(batch_size, len(order)) - len(rows))]
        adapters = None if adapter_ids is None else np.asarray(adapter_ids)[filled]
        batch = generator.batch([prompts[row] for row in filled], max_new_tokens, adapters, ended, numbers[filled])
        for row, answer in zip(rows, batch, strict=False):
            answers[row] = answer
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return answers


def decode_stream(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of tokens as they arrive, special tokens left out.

    A token may be part of a character, and may be decoded differently at the start of a text. So each new
    token is decoded behind the ones before it, and text is given out only when it ends in a whole character.
    (`tokenizers.decoders.DecodeStream` raises on bytes that are no UTF-8, which a model with byte tokens may make.)
    """
    ids: list[int] = []
    # Tokens before `start` are no longer needed as context; the text of those before `given` was given out.
    start = given = 0

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def new_text() -> str:
        return decode(ids[start:])[len(decode(ids[start:given])) :]

    for token in tokens:
        ids.append(int(token))
        text = new_text()
        if text and not text.endswith(REPLACEMENT):
            start, given = given, len(ids)
            yield text
    # What was held back, without an unfinished character.
    if text := new_text().rstrip(REPLACEMENT):
        yield text


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
        said = [*self.messages, {"role": "user", "content": text}]
        tokens = self._generator.stream(self._prompt(said), self._max_new_tokens, self._answers)
        self.messages = said
        self._answers += 1
        pieces: list[str] = []
        try:
            for piece in decode_stream(self.tokenizer, tokens):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _prompt(self, said: list[dict[str, Any]]) -> Any:
        """The tokens of a conversation, without as many turns at its beginning as leave room for an answer."""
        context = self._generator.model.config.max_positions
        room = min(self._max_new_tokens, context // 2)
        for start in range(0, len(said), 2):
            messages = with_system(said[start:], self._system)
            ids = render_prompt(self.tokenizer, messages, self.template).input_ids
            self.left_out = start
            if len(ids) + room <= context:
                return ids
        if len(ids) >= context:
            raise InputError(f"the message has {len(ids)} tokens, the model's context {context}; shorten it")
        return ids


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        where: file and line, for messages.
        given: the entry of the line, as results repeat it: `{"prompt": text}` or `{"messages": [...]}`.
        messages: for the chat template.
    """

    where: str
    given: dict[str, Any]
    messages: list[dict[str, Any]]

    @classmethod
    def of(cls, where: str, text: str, system: str | None = None) -> Prompt:
        """A user's text, behind a system message if there is one."""
        return cls(where, {"prompt": text}, with_system([{"role": "user", "content": text}], system))


def read_prompts(file: IO[bytes], name: str, system: str | None = None) -> list[Prompt]:
    """Reads prompts: a text a line, or JSON objects with `prompt` or `messages` where the first line is an object.

    Args:
        file: lines in UTF-8; blank ones are passed over.
        name: of the file, for messages.
        system: a system message before those that have none.

    Raises:
        InputError: there are none, or a line isn't understood; names it.
    """
    lines = list(read_lines(file))
    if not lines:
        raise InputError(f"{name}: there are no prompts")
    as_json = lines[0][1].lstrip().startswith(b"{")
    texts = [(f"{name}, line {number}", decode(line, Path(name), number).strip("\r\n")) for number, line in lines]
    return [_prompt(where, text, as_json, system) for where, text in texts]


def _prompt(where: str, text: str, as_json: bool, system: str | None) -> Prompt:
    try:
        given = json.loads(text) if as_json else {"prompt": text}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON object, as the first line is one: {error}") from None
    prompt, messages = (given.get(key) if isinstance(given, dict) else None for key in ("prompt", "messages"))
    if isinstance(prompt, str) and messages is None:
        return Prompt.of(where, prompt, system)
    if isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages) and prompt is None:
        if messages[-1].get("role") == "assistant":
            raise InputError(f"{where}: the messages end with an answer; leave it out, it is what is asked for")
        return Prompt(where, {"messages": messages}, with_system(messages, system))
    raise InputError(f'{where}: expected {{"prompt": TEXT}} or {{"messages": [...]}}, found {text:.80}')


def with_system(messages: Iterable[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """The messages behind a system message, unless they begin with one."""
    messages = list(messages)
    if system is None or messages[0].get("role") == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
