"""Formats: what the keys of a row mean. A format is one function and one entry in `FORMATS`.

Some say themselves what is trained: texts with labels, and token ids with labels or weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mora_jax.data.conversation import Conversation, Message, Passage, Row, TokenRow
from mora_jax.data.formats.column_mapping import Mapping
from mora_jax.data.formats.messages import read_history, read_spoken_calls, read_turns, tools_of
from mora_jax.data.formats.nearest import no_format, refusal
from mora_jax.data.formats.preferences import read_labelled, read_pair
from mora_jax.data.read.validate import (
    absent,
    check_ids,
    check_length,
    check_list,
    check_numbers,
    check_object,
    check_text,
    check_weight,
    found,
    number_as_text,
    shown,
    truth_of,
)
from mora_jax.errors import InputError

#: The label of a token that is not trained, as everywhere in this field.
IGNORED = -100


def read_segments(row: dict[str, Any], source: str, mapping: Mapping) -> Iterator[Passage]:
    """`segments`: a list of `{"text": ..., "label": ...}`; the label is true, false or a weight."""
    parts = []
    for index, item in enumerate(check_list(row.get("segments"), "segments", source)):
        key = f"segments[{index}]"
        part = check_object(item, key, source, "`text` and `label`")
        text, label = check_text(part.get("text"), f"{key}.text", source), part.get("label")
        if isinstance(label, bool):
            parts.append((text, float(label)))
        elif label is None or isinstance(label, str):
            raise InputError(
                f"{source}: `{key}.label` is {'missing or null' if label is None else shown(label)};"
                " expected true, false or a weight"
            )
        else:
            parts.append((text, check_weight(label, f"{key}.label", source)))
    yield Passage(tuple(parts), source)


def read_tokens(row: dict[str, Any], source: str, mapping: Mapping) -> Iterator[TokenRow]:
    """`input_ids`, with `labels` or `weights` or neither; what `attention_mask` marks as padding is dropped."""
    ids = check_ids(row.get("input_ids"), "input_ids", source)
    labels, weights = row.get("labels"), row.get("weights")
    if labels is not None and weights is not None:
        raise InputError(f"{source}: the row has both `labels` and `weights`; keep one, or rename one in data.columns")
    counts: list[float] | None = None
    if labels is not None:
        counts = _from_labels(labels, ids, source)
    elif weights is not None:
        weights = check_numbers(weights, "weights", source)
        check_length(weights, "weights", len(ids), source)
        counts = [check_weight(weight, f"weights[{index}]", source) for index, weight in enumerate(weights)]
    tokens = _unpadded(row.get("attention_mask"), len(ids), source)
    yield TokenRow(tuple(ids[tokens]), None if counts is None else tuple(counts[tokens]), source)


def _from_labels(value: Any, ids: list[int], source: str) -> list[float]:
    labels = check_ids(value, "labels", source, lowest=IGNORED)
    check_length(labels, "labels", len(ids), source)
    for index, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (token, IGNORED):
            raise InputError(
                f"{source}: `labels[{index}]` is {label}; expected `input_ids[{index}]`, which is {token}, or {IGNORED}"
            )
    return [float(label != IGNORED) for label in labels]


def _unpadded(value: Any, length: int, source: str) -> slice:
    """The tokens that are no padding: all but the zeros at either end of the mask."""
    if value is None:
        return slice(0, length)
    mask = check_numbers(value, "attention_mask", source)
    check_length(mask, "attention_mask", length, source)
    if 1 not in mask:
        raise InputError(f"{source}: `attention_mask` leaves no token; expected ones, and zeros for padding")
    start, stop = mask.index(1), length - mask[::-1].index(1)
    inside = set(mask[start:stop]) | set(mask[:start]) | set(mask[stop:])
    if not inside <= {0, 1} or 0 in mask[start:stop]:
        raise InputError(
            f"{source}: `attention_mask` should be ones with zeros at an end, for padding;"
            " give rows that were packed one by one"
        )
    return slice(start, stop)


#: A row as a file holds it, under our names.
RawRow = dict[str, Any]
Convert = Callable[[RawRow, str, Mapping], Iterator[Row]]


@dataclass(frozen=True)
class Keys:
    """Keys that make a row one of a format.

    Attributes:
      needed: all of these, with values.
      barred: none of these, filled or not: they would say that the needed ones mean something else.
    """

    needed: frozenset[str]
    barred: frozenset[str] = frozenset()

    def match(self, row: RawRow, filled: bool = True) -> bool:
        """Whether the row has these keys; with a value, if `filled`."""
        return self.needed <= {key for key, value in row.items() if not (filled and absent(value))} and (
            self.barred.isdisjoint(row)
        )

    def __str__(self) -> str:
        return " + ".join(f"`{key}`" for key in sorted(self.needed))


@dataclass(frozen=True)
class Format:
    """How rows with certain keys become conversations, passages or token ids.

    Attributes:
      name: as a user writes it in `config.data.format`.
      keys: a row that has one of these is of this format. The first are the names that `data.columns` maps to.
      convert: `(row, source, mapping)` -> rows (nearly always one). The columns are mapped already: only the names of
        roles are left to do.
      marks: keys of this format alone: in data of it a row with one of them and without the rest is a broken one, not
        one of another format.
      flag: a key that has to be true or false in a row by which the format is recognised.
    """

    name: str
    keys: tuple[Keys, ...]
    convert: Convert
    marks: tuple[str, ...] = ()
    flag: str = ""

    def matches(self, row: RawRow, filled: bool = True) -> bool:
        """Whether the row has the keys of this format; with a value, if `filled`."""
        return any(keys.match(row, filled) for keys in self.keys)

    def recognises(self, row: RawRow) -> bool:
        """Whether a row of unknown format is of this one."""
        return self.matches(row) and (not self.flag or truth_of(row[self.flag]) is not None)

    @property
    def wanted(self) -> str:
        """The keys in words."""
        return " or ".join(map(str, self.keys))


def _text(row: RawRow, *keys: str, source: str, default: str | None = None) -> str:
    """The text under the first of the keys that holds one that is not empty; null and NaN count as absent."""
    given = [key for key in keys if not absent(row.get(key))]
    if given:
        key = next((key for key in given if row[key] != ""), given[0])
        return check_text(row[key], key, source)
    if default is not None:
        return default
    missing = " or ".join(f"`{key}`" for key in keys)
    state = "is null" if any(key in row for key in keys) else "is missing"
    raise InputError(f"{source}: {missing} {state}; expected text")


def _answer(row: RawRow, *keys: str, source: str) -> str:
    """The text under the first of the keys that holds one; a number counts as its text."""
    return _text({**row, **{key: number_as_text(row.get(key)) for key in keys if key in row}}, *keys, source=source)


def _conversation(row: RawRow, source: str, turns: list[Message]) -> Conversation:
    """The turns, behind the system message and with the tools that stand beside them."""
    system = _text(row, "system", "system_prompt", source=source, default="")
    # Some data has the text at both places.
    if system and turns[:1] != [opening := Message("system", system)]:
        turns = [opening, *turns]
    return Conversation(tuple(turns), source=source, tools=tools_of(row, source))


def _alpaca(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    messages = read_history(row, source)
    instruction = _text(row, "instruction", source=source)
    context = _text(row, "input", "context", source=source, default="")
    messages.append(Message("user", instruction, context))
    messages.append(Message("assistant", _answer(row, "output", "response", source=source)))
    yield _conversation(row, source, messages)


def _messages(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    yield _conversation(row, source, read_turns(row.get("messages"), "messages", source, mapping))


def _sharegpt(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    key = _filled(row, "conversations", "conversation")
    yield _conversation(row, source, read_turns(row.get(key), key, source, mapping))


def _prompt_completion(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    messages = []
    for role, keys in (
        ("user", ("prompt", "inputs", "input")),
        ("assistant", ("completion", "targets", "response", "output")),
    ):
        key = _filled(row, *keys)
        messages += (
            read_turns(row[key], key, source, mapping)
            if isinstance(row.get(key), list)
            else [Message(role, (_answer if role == "assistant" else _text)(row, *keys, source=source))]
        )
    yield _conversation(row, source, messages)


def _question_answer(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    context = _text(row, "context", source=source, default="")
    question = Message("user", _text(row, "question", "query", source=source), context)
    if _filled(row, "answer", "response", "answers") == "answers":
        answer = Message("assistant", "", tool_calls=read_spoken_calls(row["answers"], "answers", source))
    else:
        answer = Message("assistant", _answer(row, "answer", "response", source=source))
    yield _conversation(row, source, [question, answer])


def _self_instruct(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    instruction = _text(row, "instruction", source=source)
    for index, item in enumerate(check_list(row.get("instances"), "instances", source)):
        instance = check_object(item, f"instances[{index}]", source, "`input` and `output`")
        yield from _alpaca({"instruction": instruction, **instance}, f"{source}, `instances[{index}]`", mapping)


def _plain(row: RawRow, source: str, mapping: Mapping) -> Iterator[Row]:
    yield Conversation(text=_text(row, "text", source=source), source=source)


def _filled(row: RawRow, *keys: str) -> str:
    """The first of the keys that has a value; the first of all if none has."""
    return next((key for key in keys if not absent(row.get(key))), keys[0])


def _format(name: str, convert: Convert, *keys: str | Keys, **more: Any) -> Format:
    entries = (entry if isinstance(entry, Keys) else Keys(frozenset(entry.split("+"))) for entry in keys)
    return Format(name, tuple(entries), convert, **more)


#: In the order in which a row is compared with them: those whose keys say most come first. Rows that were
#: tokenised often keep the columns that they were made from.
FORMATS = {
    entry.name: entry
    for entry in (
        _format("tokens", read_tokens, "input_ids"),
        _format("segments", read_segments, "segments"),
        _format("preference", read_pair, "chosen+rejected", marks=("chosen", "rejected")),
        _format("labelled", read_labelled, "prompt+completion+label", marks=("label",), flag="label"),
        _format("messages", _messages, "messages"),
        _format("sharegpt", _sharegpt, "conversations", "conversation"),
        _format("self_instruct", _self_instruct, "instruction+instances"),
        _format("alpaca", _alpaca, "instruction+output", "instruction+response"),
        _format(
            "prompt_completion",
            _prompt_completion,
            *("prompt+completion", "prompt+response", "inputs+targets"),
            # Not a row of an Alpaca set whose instruction is null.
            Keys(frozenset({"input", "output"}), barred=frozenset({"instruction"})),
        ),
        _format(
            "question_answer",
            _question_answer,
            *("question+answer", "query+response", "question+response", "query+answer", "query+answers+tools"),
        ),
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
    return next((candidate for candidate in FORMATS.values() if candidate.recognises(row)), None)


def detect_format(rows: Sequence[tuple[str, Any]]) -> Format:
    """The format of the first row of which one is recognised.

    Args:
      rows: the first rows, under our names, each with its source.

    Raises:
      InputError: if none is recognised; it speaks of the first row.
    """
    for source, row in rows:
        if reason := refusal(row):
            raise InputError(f"{source}: {reason}")
        if chosen := recognise(row):
            return chosen
    source, row = rows[0]
    if not isinstance(row, dict):
        raise InputError(f"{source}: a row should be an object with keys and is {found(row)}")
    for candidate in FORMATS.values():
        # All keys of a format and null in one of them: its own check says which.
        if candidate.matches(row, filled=False):
            return candidate
    raise InputError(f"{source}: {no_format(row, [(entry.name, entry.keys[0].needed) for entry in FORMATS.values()])}")
