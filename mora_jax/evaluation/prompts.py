"""Prompts out of a file or a stream, one a line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any

from mora_jax.data.read.files import read_lines
from mora_jax.errors import InputError


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


def read_prompts(file: IO[bytes], name: str, system: str | None = None) -> list[Prompt]:
    """Reads prompts: a text a line, or JSON objects with `prompt` or `messages` where the first line is an object.

    Args:
        file: lines in UTF-8; blank ones are passed over.
        name: of the file, for messages.
        system: a system message before those that have none.

    Raises:
        InputError: there are none, or a line isn't understood; names it.
    """
    lines = read_lines(file)
    first = next(lines, None)
    if first is None:
        raise InputError(f"{name}: there are no prompts")
    as_json = first[1].lstrip().startswith(b"{")
    return [
        _prompt(f"{name}, line {number}", line, as_json, system) for number, line in itertools.chain([first], lines)
    ]


def _prompt(where: str, line: bytes, as_json: bool, system: str | None) -> Prompt:
    try:
        text = line.decode("utf-8").strip("\r\n")
        given = json.loads(text) if as_json else {"prompt": text}
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not valid UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except ValueError as error:
        raise InputError(f"{where}: no JSON object, as the first line is one: {error}") from None
    prompt, messages = (given.get(key) if isinstance(given, dict) else None for key in ("prompt", "messages"))
    if isinstance(prompt, str) and messages is None:
        return Prompt(where, {"prompt": prompt}, with_system([{"role": "user", "content": prompt}], system))
    if isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages) and prompt is None:
        return Prompt(where, {"messages": messages}, with_system(messages, system))
    raise InputError(f'{where}: expected {{"prompt": TEXT}} or {{"messages": [...]}}, found {text:.80}')


def with_system(messages: Iterable[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """The messages behind a system message, unless they begin with one."""
    messages = list(messages)
    if system is None or messages[0].get("role") == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
