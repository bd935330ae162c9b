"""Tools: their descriptions and the calls of them, from the forms in which data holds them to one."""

from __future__ import annotations

from typing import Any

from mora_jax.data.read.validate import (
    check_list,
    check_object,
    check_plain,
    check_text,
    found,
    optional_list,
    parse_json,
)
from mora_jax.errors import InputError

_CALL = "`name` and `arguments`"


def read_tools(value: Any, key: str, source: str) -> tuple[dict[str, Any], ...]:
    """Descriptions of tools: a list of objects or JSON text of one; `optional_list` says what means none.

    Returns:
      Each as `{"type": "function", "function": {...}}`; an object that is the inner one alone is put into it.
    """
    tools = []
    for index, item in enumerate(optional_list(value, key, source)):
        here = f"{key}[{index}]"
        tool = check_object(item, here, source, "`type` and `function`")
        nested = tool.get("function") is not None
        function = tool["function"] if nested else tool
        name = check_object(function, f"{here}.function", source, "`name`").get("name")
        check_text(name, f"{here}.function.name" if nested else f"{here}.name", source)
        check_plain(tool, here, source)
        tools.append(tool if nested else {"type": "function", "function": tool})
    return tuple(tools)


def read_calls(value: Any, key: str, source: str) -> tuple[dict[str, Any], ...]:
    """An assistant's calls: a list of objects or JSON text of one; `optional_list` says what means none.

    Returns:
      Each as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with its `id` if it has one.
    """
    return tuple(
        _read_call(item, f"{key}[{index}]", source) for index, item in enumerate(optional_list(value, key, source))
    )


def read_spoken_calls(value: Any, key: str, source: str) -> tuple[dict[str, Any], ...]:
    """The calls of a turn whose words are JSON, such as those of `function_call`: one call or a list of them."""
    spoken = parse_json(value, key, source) if isinstance(value, str) else value
    if isinstance(spoken, list):
        return read_calls(check_list(spoken, key, source), key, source)
    return (_read_call(spoken, key, source),)


def _read_call(item: Any, key: str, source: str) -> dict[str, Any]:
    call = check_object(item, key, source, f"`function`, an object with {_CALL}")
    nested = call.get("function") is not None
    inner = f"{key}.function" if nested else key
    function = check_object(call["function"] if nested else call, inner, source, _CALL)
    name = check_text(function.get("name"), f"{inner}.name", source)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments, f"{inner}.arguments", source)
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise InputError(
            f"{source}: `{inner}.arguments` should be an object or JSON text of one and is {found(arguments)}"
        )
    check_plain(arguments, f"{inner}.arguments", source)
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        read["id"] = check_text(call["id"], f"{key}.id", source)
    return read
