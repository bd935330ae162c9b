"""Prompts in, text out: the chat template, the tokens that end an answer, and decoding around `Generator`."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax.data.conversation import Conversation, Message
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
    found: set[int] = set()
    sources = {"the tokenizer": {"eos_token_id": tokenizer.eos_token_id}, "config.json": model.config.hf_config}
    if model.folder is not None and (path := Path(model.folder) / "generation_config.json").exists():
        sources[str(path)] = read_json(path)
    for name, source in sources.items():
        stated = source.get("eos_token_id")
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise InputError(f"{name}: eos_token_id must be a token id or a list of them, found {reprlib.repr(stated)}")
        # Others are never made: -1 stands for none in some files.
        found.update(token for token in ids if 0 <= token < model.config.vocab_size)
    return frozenset(found)


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


class TextStream:
    """Decodes tokens one by one.

    A token may be part of a character, and may be decoded differently at the start of a text. So each new
    token is decoded behind the ones before it, and text is given out only when it ends in a whole character.
    (`tokenizers.decoders.DecodeStream` raises on bytes that are no UTF-8, which a model with byte tokens may make.)
    """

    def __init__(self, tokenizer: Any) -> None:
        """Takes a transformers tokenizer; special tokens are left out of the text."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # tokens before are no longer needed as context
        self._given = 0  # tokens whose text was given out

    def push(self, token: int) -> str:
        """Adds a token and returns the text that is complete with it; may be empty."""
        self._ids.append(int(token))
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return text

    def end(self) -> str:
        """Returns what was held back, without an unfinished character."""
        text = self._new_text().rstrip(REPLACEMENT)
        self._start = self._given = len(self._ids)
        return text

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._start : self._given])
        whole = self._decode(self._ids[self._start :])
        return whole[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_stream(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of tokens as they arrive, special tokens left out."""
    stream = TextStream(tokenizer)
    for token in tokens:
        if text := stream.push(token):
            yield text
    if text := stream.end():
        yield text
