"""Formats: what the keys of a row mean. A format is one function and one entry in `FORMATS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mora_jax.data.checks import check_list, check_object, check_text, found, shown
from mora_jax.data.conversation import Conversation, Message, Row
from mora_jax.data.mapping import Mapping
from mora_jax.data.messages import read_message, read_turns
from mora_jax.data.prepared import read_segments, read_tokens
from mora_jax.data.tool_calls import read_tools
from mora_jax.errors import InputError

__all__ = ["FORMATS", "Format", "RawRow", "detect_format", "find_format", "read_message", "recognise"]

#: A row as a file holds it, under our names.
RawRow = dict[str, Any]
Convert = Callable[[RawRow, str, Mapping], Iterator[Row]]


@dataclass(frozen=True)
class Format:
    """How rows with certain keys become conversations, passages or token ids.

    Attributes:
      name: as a user writes it in `config.data.format`.
      keys: sets of keys; a row that has all of one set is of this format.
      convert: `(row, source, mapping)` -> rows (nearly always one). The columns are mapped already.
    """

    name: str
    keys: tuple[frozenset[str], ...]
    convert: Convert

    def matches(self, row: RawRow, filled: bool = True) -> bool:
        """Whether the row has the keys of this format; with a value, if `filled`."""
        present = {key for key, value in row.items() if value is not None or not filled}
        return any(keys <= present for keys in self.keys)

    @property
    def wanted(self) -> str:
        """The keys in words."""
        return " or ".join(" + ".join(f"`{key}`" for key in sorted(keys)) for keys in self.keys)


def _text(row: RawRow, *keys: str, source: str, default: str | None = None) -> str:
    """The text under the first of the keys that holds one that is not empty; null counts as absent."""
    given = [key for key in keys if row.get(key) is not None]
    if given:
        key = next((key for key in given if row[key] != ""), given[0])
        return check_text(row[key], key, source)
    if default is not None:
        return default
    missing = " or ".join(f"`{key}`" for key in keys)
    state = "is null" if any(key in row for key in keys) else "is missing"
    raise InputError(f"{source}: {missing} {state}; expected text")


def _system(row: RawRow, source: str) -> list[Message]:
    text = _text(row, "system", source=source, default="")
    return [Message("system", text)] if text else []


def _tools(row: RawRow, source: str) -> tuple[dict[str, Any], ...]:
    return read_tools(row.get("tools"), "tools", source)


def _alpaca(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    del mapping
    messages = _system(row, source)
    history = row.get("history")
    for turn, pair in enumerate(check_list(history, "history", source) if history else []):
        key = f"history[{turn}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"{source}: `{key}` should be a pair of texts, [instruction, answer]")
        messages.append(Message("user", check_text(pair[0], f"{key}[0]", source)))
        messages.append(Message("assistant", check_text(pair[1], f"{key}[1]", source)))
    instruction = _text(row, "instruction", source=source)
    context = _text(row, "input", "context", source=source, default="")
    messages.append(Message("user", instruction, context))
    messages.append(Message("assistant", _text(row, "output", "response", source=source)))
    yield Conversation(tuple(messages), source=source)


def _messages(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    turns = read_turns(row.get("messages"), "messages", source, mapping)
    yield Conversation((*_system(row, source), *turns), source=source, tools=_tools(row, source))


def _sharegpt(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    turns = read_turns(row.get("conversations"), "conversations", source, mapping)
    yield Conversation((*_system(row, source), *turns), source=source, tools=_tools(row, source))


def _prompt_completion(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    messages = _system(row, source)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(key)
        messages += (
            read_turns(value, key, source, mapping)
            if isinstance(value, list)
            else [Message(role, _text(row, key, source=source))]
        )
    yield Conversation(tuple(messages), source=source, tools=_tools(row, source))


def _question_answer(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    del mapping
    question = Message("user", _text(row, "question", "query", source=source))
    answer = Message("assistant", _text(row, "answer", "response", source=source))
    yield Conversation((*_system(row, source), question, answer), source=source)


def _self_instruct(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    instruction = _text(row, "instruction", source=source)
    for index, item in enumerate(check_list(row.get("instances"), "instances", source)):
        instance = check_object(item, f"instances[{index}]", source, "`input` and `output`")
        yield from _alpaca({"instruction": instruction, **instance}, f"{source}, `instances[{index}]`", mapping)


def _plain(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    del mapping
    yield Conversation(text=_text(row, "text", source=source), source=source)


def _format(name: str, convert: Convert, *keys: str) -> Format:
    return Format(name, tuple(frozenset(alternative.split("+")) for alternative in keys), convert)


#: In the order in which a row is compared with them: those whose keys say most come first. Rows that were
#: tokenised often keep the columns that they were made from.
FORMATS = {
    entry.name: entry
    for entry in (
        _format("tokens", read_tokens, "input_ids"),
        _format("segments", read_segments, "segments"),
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


def recognise(row: Any) -> Format | None:
    """The first format whose keys the row has, with values; None if it is of none."""
    if not isinstance(row, dict):
        return None
    return next((candidate for candidate in FORMATS.values() if candidate.matches(row)), None)


def detect_format(rows: Sequence[tuple[str, Any]]) -> Format:
    """The format of the first row of which one is recognised.

    Args:
      rows: the first rows, under our names, each with its source.

    Raises:
      InputError: if none is recognised; it speaks of the first row.
    """
    for _, row in rows:
        if chosen := recognise(row):
            return chosen
    source, row = rows[0]
    if not isinstance(row, dict):
        raise InputError(f"{source}: a row should be an object with keys and is {found(row)}")
    for candidate in FORMATS.values():
        # All keys of a format and null in one of them: its own check says which.
        if candidate.matches(row, filled=False):
            return candidate
    keys = [shown(key) for key in row]
    names = ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")
    wanted = "; ".join(f"{entry.name}: {entry.wanted}" for entry in FORMATS.values())
    raise InputError(
        f"{source}: no known format has the keys {names or '(none)'}; known are {wanted}; columns can be renamed in"
        ' data.columns, such as "instruction=question"'
    )
