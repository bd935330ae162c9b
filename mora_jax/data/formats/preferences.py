"""Preferences: rows that judge answers, by another one beside it or by a label.

A pair becomes two rows, the chosen answer and then the rejected one, after one prompt; a labelled completion one row.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mora_jax.data.conversation import Conversation, Message, Passage, Row, Side
from mora_jax.data.formats.column_mapping import Mapping
from mora_jax.data.formats.messages import read_history, read_turns, tools_of
from mora_jax.data.read.validate import absent, check_text, number_as_text, shown, truth_of
from mora_jax.errors import InputError

#: Keys of what the answers are to; the first that is filled is read.
_PROMPTS = ("prompt", "conversations", "conversation", "question", "instruction", "query", "input")
#: The turns of HH-RLHF's transcripts.
_TRANSCRIPT = re.compile(r"\s*\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def read_pair(row: dict[str, Any], source: str, mapping: Mapping) -> Iterator[Row]:
    """The two rows of `chosen` and `rejected`.

    Each is text, a message, or a list of messages. The prompt stands under a key of its own, or both answers begin with
    it; texts may be transcripts as of HH-RLHF. Texts that share a beginning and nothing else says what it is are
    continued without a template.

    Raises:
        InputError: an answer is missing, both are equal, or they answer different prompts.
    """
    for key in ("chosen", "rejected"):
        if absent(row.get(key)) or row[key] in ("", []):
            raise InputError(f"{source}: `{key}` is missing or empty: a pair has `chosen` and `rejected`")
    prompt = _prompt(row, source, mapping)
    answers = [_answer(row[key], key, source, mapping) for key in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        raise InputError(f"{source}: `chosen` and `rejected` are equal: such a pair says nothing; drop the row")
    lists = [answer for answer in answers if isinstance(answer, list)]
    system = _system(row, source, [prompt, *lists])
    sides = (Side.CHOSEN, Side.REJECTED)
    names = [f"{source}, {side.name.lower()}" for side in sides]
    texts = [answer for answer in answers if isinstance(answer, str)]
    if not prompt and not lists:
        if system:
            raise InputError(f"{source}: there is a system message and no `prompt` that it is said before")
        shared = os.path.commonprefix(texts).rstrip()
        if not shared:
            raise InputError(f"{source}: there is no `prompt`, and `chosen` and `rejected` begin differently")
        for text, side, name in zip(texts, sides, names, strict=True):
            yield Passage(((shared, 0.0), (text[len(shared) :], 1.0)), name, side=side, answer=1)
        return
    chosen, rejected = (
        [Message("assistant", answer)] if isinstance(answer, str) else _after(prompt, answer, key, source)
        for answer, key in zip(answers, ("chosen", "rejected"), strict=True)
    )
    if not prompt:
        same = (one == other for one, other in zip(chosen, rejected, strict=False))
        shared_turns = next((turn for turn, equal in enumerate(same) if not equal), min(len(chosen), len(rejected)))
        prompt, chosen, rejected = chosen[:shared_turns], chosen[shared_turns:], rejected[shared_turns:]
    for turns, key in ((chosen, "chosen"), (rejected, "rejected")):
        if not prompt or not turns or turns[0].role != "assistant":
            raise InputError(
                f"{source}: `chosen` and `rejected` answer different prompts: after equal turns each goes on with an "
                f"assistant's, and `{key}` {f'with one of the {turns[0].role}' if turns else 'ends there'}"
            )
    for turns, side, name in zip((chosen, rejected), sides, names, strict=True):
        yield _conversation(row, name, system, prompt, turns, side)


def read_labelled(row: dict[str, Any], source: str, mapping: Mapping) -> Iterator[Row]:
    """A `completion` of a `prompt` with a `label`, true where it is wanted."""
    label = row.get("label")
    desired, number = truth_of(label), number_as_text(label)
    if number in ("0", "1", "0.0", "1.0"):  # which alone don't tell the format: they could be classes
        desired = number in ("1", "1.0")
    if desired is None:
        raise InputError(f"{source}: `label` is {shown(label)}; expected true or false, or 1 or 0")
    prompt, answer = _prompt(row, source, mapping), _answer(row.get("completion"), "completion", source, mapping)
    if not prompt or not answer:
        raise InputError(f"{source}: `{'completion' if prompt else 'prompt'}` is empty")
    turns = [Message("assistant", answer)] if isinstance(answer, str) else _after(prompt, answer, "completion", source)
    if not turns or turns[0].role != "assistant":
        raise InputError(f"{source}: `completion` does not begin with an assistant's turn")
    system = _system(row, source, [prompt, answer] if isinstance(answer, list) else [prompt])
    yield _conversation(row, source, system, prompt, turns, Side.DESIRED if desired else Side.UNDESIRED)


def _conversation(
    row: dict[str, Any], source: str, system: list[Message], prompt: list[Message], answer: list[Message], side: Side
) -> Conversation:
    prompt = prompt if prompt[0].role == "system" else [*system, *prompt]
    tools = tools_of(row, source)
    return Conversation((*prompt, *answer), source=source, tools=tools, side=side, answer=len(prompt))


def _prompt(row: dict[str, Any], source: str, mapping: Mapping) -> list[Message]:
    """The turns before the answers; none where no key holds any."""
    key = next((key for key in _PROMPTS if not absent(row.get(key)) and row[key] not in ("", [])), None)
    if key is None:
        return []
    value = number_as_text(row[key])
    if isinstance(value, str) and not key.startswith("conversation"):
        context = row.get("input") if key == "instruction" and isinstance(row.get("input"), str) else ""
        turns = _transcript(check_text(value, key, source)) or [Message("user", value, context or "")]
        return [*read_history(row, source), *turns] if key == "instruction" else turns
    return read_turns(value, key, source, mapping)


def _system(row: dict[str, Any], source: str, parts: list[list[Message]]) -> list[Message]:
    """The system message with which the prompt or the answers begin, or else that of a column; none without.

    Raises:
        InputError: they begin with different ones.
    """
    said = [turns[0] for turns in parts if turns and turns[0].role == "system"]
    if any(message != said[0] for message in said):
        raise InputError(f"{source}: prompt and answers begin with different system messages")
    if said:
        return said[:1]
    key = next((name for name in ("system", "system_prompt") if row.get(name) and not absent(row[name])), None)
    return [] if key is None else [Message("system", check_text(row[key], key, source))]


def _answer(value: Any, key: str, source: str, mapping: Mapping) -> str | list[Message]:
    """Text, or the messages of an answer, which may begin with its prompt."""
    if isinstance(value, dict | list):
        return read_turns([value] if isinstance(value, dict) else value, key, source, mapping)
    text = check_text(number_as_text(value), key, source)
    return _transcript(text) or text


def _transcript(text: str) -> list[Message]:
    """The turns of a transcript, the last of which may be one that is still to be said; none of another text."""
    if not text.startswith(("\n\nHuman:", "Human:")):
        return []
    _, *parts = _TRANSCRIPT.split(f"\n\n{text.lstrip()}")
    turns = [Message(_SPEAKERS[name], said.strip()) for name, said in zip(parts[::2], parts[1::2], strict=True)]
    return turns[:-1] if not turns[-1].text and turns[-1].role == "assistant" else turns


def _after(prompt: list[Message], answer: list[Message], key: str, source: str) -> list[Message]:
    """The messages of an answer behind those of its prompt, where it begins with them."""
    if not prompt or answer[0].role == "assistant":
        return answer
    asked = [message for message in prompt if message.role != "system"]
    given = [message for message in answer if message.role != "system"]
    if [replace(message, context="", content=message.text) for message in asked] != given[: len(asked)]:
        raise InputError(f"{source}: `{key}` begins with another prompt than the row's own")
    return given[len(asked) :]
