"""Formats: what the keys of a row mean. A format is one function and one entry in `FORMATS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mora_jax.data.conversation import Conversation, Message
from mora_jax.errors import InputError

Row = Mapping[str, Any]

#: Spellings of roles in the wild, and the four that the rest of the package knows.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Format:
    """How rows with certain keys become conversations.

    Attributes:
      name: as a user writes it in `config.data.format`.
      keys: sets of keys; a row that has all of one set is of this format.
      convert: `(row, source)` -> conversations (nearly always one).
    """

    name: str
    keys: tuple[frozenset[str], ...]
    convert: Callable[[Row, str], Iterator[Conversation]]

    def matches(self, row: Row) -> bool:
        """Whether the row has the keys of this format, with a value."""
        present = {key for key, value in row.items() if value is not None}
        return any(keys <= present for keys in self.keys)

    @property
    def wanted(self) -> str:
        """The keys in words."""
        return " or ".join(" + ".join(f"`{key}`" for key in sorted(keys)) for keys in self.keys)


def _found(value: Any) -> str:
    names = {type(None): "missing or null", dict: "an object", list: "a list", bool: "a boolean", str: "text"}
    return names.get(type(value), "a number")


def check_text(value: Any, key: str, source: str) -> str:
    """Returns the value if it is text that can be encoded, else raises `InputError`."""
    if not isinstance(value, str):
        raise InputError(f"{source}: `{key}` should be text and is {_found(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: `{key}` holds a lone surrogate \\u{ord(value[error.start]):04x} at character"
            f" {error.start}, which is half a character; repair or drop the row"
        ) from None
    return value


def _text(row: Row, *keys: str, source: str, default: str | None = None) -> str:
    """The text under the first of the keys that the row has; null counts as absent."""
    for key in keys:
        if row.get(key) is not None:
            return check_text(row[key], key, source)
    if default is not None:
        return default
    missing = " or ".join(f"`{key}`" for key in keys)
    state = "is null" if any(key in row for key in keys) else "is missing"
    raise InputError(f"{source}: {missing} {state}; expected text")


def _list(value: Any, key: str, source: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        found = "empty" if value == [] else _found(value)
        raise InputError(f"{source}: `{key}` should be a filled list and is {found}")
    return value


def _system(row: Row, source: str) -> list[Message]:
    text = _text(row, "system", source=source, default="")
    return [Message("system", text)] if text else []


def _alpaca(row: Row, source: str) -> Iterator[Conversation]:
    messages = _system(row, source)
    history = row.get("history")
    for turn, pair in enumerate(_list(history, "history", source) if history else []):
        key = f"history[{turn}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"{source}: `{key}` should be a pair of texts, [instruction, answer]")
        messages.append(Message("user", check_text(pair[0], key, source)))
        messages.append(Message("assistant", check_text(pair[1], key, source)))
    messages.append(
        Message(
            "user",
            _text(row, "instruction", source=source),
            _text(row, "input", "context", source=source, default=""),
        )
    )
    messages.append(Message("assistant", _text(row, "output", "response", source=source)))
    yield Conversation(tuple(messages), source=source)


def _content(value: Any, key: str, source: str) -> str:
    """The content of a message: text, or a list of text parts."""
    if not isinstance(value, list):
        return check_text(value, key, source)
    texts = []
    for index, part in enumerate(value):
        here = f"{key}[{index}]"
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            raise InputError(
                f'{source}: `{here}` should be {{"type": "text", "text": ...}}: only text can be trained'
            )
        texts.append(check_text(part.get("text"), f"{here}.text", source))
    return "".join(texts)


def read_message(
    item: Any, key: str, source: str, role_key: str = "role", content_key: str = "content"
) -> Message:
    """One message from an object; `key` and `source` say in errors where it is."""
    if not isinstance(item, dict):
        raise InputError(
            f"{source}: `{key}` should be an object with `{role_key}` and `{content_key}`,"
            f" and is {_found(item)}"
        )
    role = item.get(role_key)
    if role is None:
        raise InputError(f"{source}: `{key}` has no `{role_key}`; expected one of {', '.join(ROLES)}")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{source}: `{key}.{role_key}` is {role!r}; expected one of {', '.join(ROLES)}")
    if item.get("tool_calls"):
        raise InputError(
            f"{source}: `{key}.tool_calls` cannot be trained on; write the call into"
            f" `{content_key}` or drop the row"
        )
    if item.get("weight") not in (None, 1):
        raise InputError(
            f"{source}: `{key}.weight` is {item['weight']!r}; weights of single messages are not supported"
        )
    return Message(ROLES[role], _content(item.get(content_key), f"{key}.{content_key}", source))


def _turns(
    value: Any, key: str, source: str, role_key: str = "role", content_key: str = "content"
) -> list[Message]:
    items = _list(value, key, source)
    return [read_message(item, f"{key}[{i}]", source, role_key, content_key) for i, item in enumerate(items)]


def _messages(row: Row, source: str) -> Iterator[Conversation]:
    yield Conversation(tuple(_turns(row.get("messages"), "messages", source)), source=source)


def _sharegpt(row: Row, source: str) -> Iterator[Conversation]:
    turns = _turns(row.get("conversations"), "conversations", source, "from", "value")
    yield Conversation((*_system(row, source), *turns), source=source)


def _prompt_completion(row: Row, source: str) -> Iterator[Conversation]:
    messages = _system(row, source)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(key)
        messages += (
            _turns(value, key, source)
            if isinstance(value, list)
            else [Message(role, _text(row, key, source=source))]
        )
    yield Conversation(tuple(messages), source=source)


def _question_answer(row: Row, source: str) -> Iterator[Conversation]:
    question = Message("user", _text(row, "question", "query", source=source))
    answer = Message("assistant", _text(row, "answer", "response", source=source))
    yield Conversation((*_system(row, source), question, answer), source=source)


def _self_instruct(row: Row, source: str) -> Iterator[Conversation]:
    instruction = _text(row, "instruction", source=source)
    for index, instance in enumerate(_list(row.get("instances"), "instances", source)):
        here = f"{source}, `instances[{index}]`"
        if not isinstance(instance, dict):
            raise InputError(
                f"{here} should be an object with `input` and `output` and is {_found(instance)}"
            )
        yield from _alpaca({"instruction": instruction, **instance}, here)


def _plain(row: Row, source: str) -> Iterator[Conversation]:
    yield Conversation(text=_text(row, "text", source=source), source=source)


def _format(name: str, convert: Callable[[Row, str], Iterator[Conversation]], *keys: str) -> Format:
    return Format(name, tuple(frozenset(alternative.split("+")) for alternative in keys), convert)


#: In the order in which a row is compared with them: those whose keys say most come first.
FORMATS = {
    entry.name: entry
    for entry in (
        _format("messages", _messages, "messages"),
        _format("sharegpt", _sharegpt, "conversations"),
        _format("prompt_completion", _prompt_completion, "prompt+completion"),
        _format("self_instruct", _self_instruct, "instruction+instances"),
        _format("alpaca", _alpaca, "instruction+output", "instruction+response"),
        _format("question_answer", _question_answer, "question+answer", "query+response"),
        _format("text", _plain, "text"),
    )
}


def find_format(name: str) -> Format:
    """The format of that name, or `InputError` with the names that exist."""
    if name not in FORMATS:
        raise InputError(f"unknown data format {name!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def detect_format(row: Any, source: str) -> Format:
    """The first format whose keys the row has."""
    if not isinstance(row, dict):
        raise InputError(f"{source}: a row should be an object with keys and is {_found(row)}")
    for candidate in FORMATS.values():
        if candidate.matches(row):
            return candidate
    wanted = "; ".join(f"{entry.name}: {entry.wanted}" for entry in FORMATS.values())
    raise InputError(
        f"{source}: no known format has the keys {', '.join(map(repr, row)) or '(none)'}; known are {wanted}"
    )
