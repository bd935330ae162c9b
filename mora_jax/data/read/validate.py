"""Checks of the values in a row. What fails raises one line: file and row, key, what was found, what was expected.

`value` is what stands under `key` in the row, `source` the row's file and number.
"""

import ast
import json
import math
from collections.abc import Sequence
from typing import Any

from mora_jax.errors import InputError

#: The largest weight: a row's times a token's then adds up in float32 over any batch.
MAX_WEIGHT = 1e15
#: The largest token id: that of int32.
MAX_ID = 2**31 - 1

_KINDS = {type(None): "missing or null", dict: "an object", list: "a list", bool: "a boolean", str: "text"}


def absent(value: Any) -> bool:
    """Whether a value says nothing: null, or the NaN that pandas has in its place."""
    return value is None or (isinstance(value, float) and value != value)


def found(value: Any) -> str:
    """What kind of value it is, in words."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def shown(value: Any) -> str:
    """The value itself, cut to what a line can hold."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_text(value: Any, key: str, source: str) -> str:
    """Returns the value if it is text that can be encoded, else raises `InputError`."""
    if not isinstance(value, str):
        raise InputError(f"{source}: `{key}` should be text and is {found(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: `{key}` holds a lone surrogate \\u{ord(value[error.start]):04x} at character"
            f" {error.start}, which is half a character; repair or drop the row"
        ) from None
    return value


def number_as_text(value: Any) -> Any:
    """The text of a number, without a fraction that is 0; any other value as it is.

    >>> number_as_text(8.0), number_as_text(-0.5), number_as_text("8.0"), number_as_text(True)
    ('8', '-0.5', '8.0', True)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return value
    return str(int(value) if value == int(value) else value)


def truth_of(value: Any) -> bool | None:
    """A truth value, or that of its text, as a cell of a table holds it; None for another value.

    >>> truth_of(True), truth_of("False"), truth_of("yes"), truth_of(1)
    (True, False, None, None)
    """
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def check_list(value: Any, key: str, source: str) -> list[Any]:
    """Returns the value if it is a list with something in it; JSON text of one counts, as CSV cells hold it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, key, source)
    if not isinstance(value, list) or not value:
        raise InputError(f"{source}: `{key}` should be a filled list and is {'empty' if value == [] else found(value)}")
    return value


def optional_list(value: Any, key: str, source: str) -> list[Any]:
    """Returns a list that may be absent: null, blank text, `[]`, and JSON text of null or `[]` are an empty list."""
    if absent(value) or value == [] or (isinstance(value, str) and value.strip() in ("", "null", "[]")):
        return []
    return check_list(value, key, source)


def check_object(value: Any, key: str, source: str, expected: str) -> dict[str, Any]:
    """Returns the value if it is an object; `expected` says in errors what should be in it."""
    if not isinstance(value, dict):
        raise InputError(f"{source}: `{key}` should be an object with {expected}, and is {found(value)}")
    return value


def check_plain(value: Any, key: str, source: str) -> None:
    """Raises `InputError` unless the value is made of what JSON knows, and all texts in it can be encoded."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: `{key}` should be plain JSON ({one_line(error)})") from None
    check_text(text, key, source)


def check_weight(value: Any, key: str, source: str) -> float:
    """Returns a weight as a float: a number from 0 to `MAX_WEIGHT`, or text of one, as CSV cells hold it."""
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    # A comparison with NaN is false.
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= MAX_WEIGHT:
        raise InputError(f"{source}: `{key}` is {shown(value)}; expected a weight, a number from 0 to {MAX_WEIGHT:g}")
    return float(number)


def check_numbers(value: Any, key: str, source: str) -> list[int | float]:
    """Returns a filled list of numbers, booleans being none."""
    items = check_list(value, key, source)
    if not set(map(type, items)) <= {int, float}:
        index, item = next((i, x) for i, x in enumerate(items) if type(x) not in (int, float))
        raise InputError(f"{source}: `{key}[{index}]` should be a number and is {found(item)}")
    return items


def check_ids(value: Any, key: str, source: str, lowest: int = 0) -> list[int]:
    """Returns a filled list of whole numbers, such as token ids."""
    items = check_list(value, key, source)
    if set(map(type, items)) != {int} or min(items) < lowest or max(items) > MAX_ID:
        index, item = next((i, x) for i, x in enumerate(items) if type(x) is not int or not lowest <= x <= MAX_ID)
        raise InputError(
            f"{source}: `{key}[{index}]` is {shown(item)}; expected a token id,"
            f" a whole number from {lowest} to {MAX_ID}"
        )
    return items


def check_length(items: Sequence[Any], key: str, length: int, source: str) -> None:
    """Raises `InputError` unless there is one item for each token."""
    if len(items) != length:
        raise InputError(
            f"{source}: `{key}` has {len(items)} entries for {length} `input_ids`; expected one for each id"
        )


def parse_json(text: str, key: str, source: str) -> Any:
    """The value of JSON text that stands inside a row."""
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{source}: `{key}` is JSON nested too deeply to read") from None
    except ValueError as error:
        hint = "; it looks like Python's repr: write it with json.dumps" if _is_literal(text) else ""
        raise InputError(f"{source}: `{key}` is text that is no JSON ({one_line(error)}){hint}") from None


def _is_literal(text: str) -> bool:
    """Whether a text is what `str` makes of a Python list or dict, as pandas writes them into CSV cells."""
    try:
        return isinstance(ast.literal_eval(text), list | dict)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def one_line(error: BaseException) -> str:
    """The message of an error of another library, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
