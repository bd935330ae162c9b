"""Messages: the objects that chat formats have in their lists, with the tools that they call."""

import re
from typing import Any

from mora_jax.data.conversation import Message
from mora_jax.data.formats.column_mapping import NO_MAPPING, ROLES, Mapping
from mora_jax.data.read.validate import (
    check_list,
    check_object,
    check_plain,
    check_text,
    check_weight,
    found,
    optional_list,
    parse_json,
    shown,
)
from mora_jax.errors import InputError

#: Keys of whole conversations.
CHATS = ("messages", "conversations", "conversation")
#: Keys under which data has what the assistant thought; the first that is filled is read.
_REASONING = ("reasoning_content", "reasoning", "thinking")
#: Roles whose words are calls in JSON.
_SPOKEN_CALLS = ("function_call", "tool_call")


def read_message(
    item: Any,
    key: str,
    source: str,
    role_key: str = "role",
    content_key: str = "content",
    mapping: Mapping = NO_MAPPING,
) -> Message:
    """One message from an object.

    Args:
      item: the object, with a role and a content; it may have `name`, `reasoning_content` (or `reasoning` or
        `thinking`), `tool_calls`, `tool_call_id`, and `weight` or `train`. Null and "" count as absent.
      key: where it is in the row, for errors.
      source: where the row is, for errors.
      role_key: the key of the role.
      content_key: the key of the content: text, a list of text parts, or null beside `tool_calls`.
      mapping: other names for roles.

    Raises:
      InputError: says what of it cannot be used.
    """
    check_object(item, key, source, f"`{role_key}` and `{content_key}`")
    spelled = _role(item, key, source, role_key, mapping)
    role = ROLES[spelled]
    content, content_at = item.get(content_key), f"{key}.{content_key}"
    thought_key = next((name for name in _REASONING if item.get(name)), _REASONING[0])
    reasoning = check_text(item.get(thought_key) or "", f"{key}.{thought_key}", source)
    if spelled in _SPOKEN_CALLS:
        calls, content = read_spoken_calls(content, content_at, source), None
    else:
        calls = read_calls(item.get("tool_calls"), f"{key}.tool_calls", source)
        if not calls and _says_something(older := item.get("function_call")):
            # The one call of a message in OpenAI's older form.
            calls = read_spoken_calls(older, f"{key}.function_call", source)
    for name, value in (("tool_calls", calls), (thought_key, reasoning)):
        if value and role != "assistant":
            raise InputError(f"{source}: `{key}.{name}` belongs to an assistant's message, and this is a {role}'s")
    return Message(
        role,
        "" if content is None and calls else _content(content, content_at, source),
        weight=_weight(item, key, source),
        name=check_text(item.get("name") or "", f"{key}.name", source),
        reasoning=reasoning,
        tool_calls=calls,
        tool_call_id=check_text(item.get("tool_call_id") or "", f"{key}.tool_call_id", source),
    )


def has_plain_turns(row: Any) -> bool | None:
    """Whether a row's conversation is a list of plain texts, not of objects; None where it has none."""
    value = next((row[key] for key in CHATS if row.get(key)), None) if isinstance(row, dict) else None
    if isinstance(value, str) and (beginning := re.match(r"\s*\[\s*(.)", value)):  # a cell of a CSV table
        return beginning[1] == '"'
    return all(isinstance(item, str) for item in value) if isinstance(value, list) else None


def read_turns(value: Any, key: str, source: str, mapping: Mapping) -> list[Message]:
    """The messages of a list.

    Each may have its role and content under `role`, `content` or `from`, `value`, or be a pair of `input` and
    `output`. In a conversation of plain texts the user and the assistant take turns.
    """
    items = check_list(value, key, source)
    if key in CHATS and all(isinstance(item, str) for item in items):
        texts = (check_text(item, f"{key}[{index}]", source) for index, item in enumerate(items))
        return [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]
    messages = []
    for index, item in enumerate(items):
        here, tags = f"{key}[{index}]", ("role", "content")
        # Either pair is read in either list; where neither is there, the list's own is named as missing.
        if isinstance(item, dict) and item.get("role") is None:
            if item.get("from") is None and {"input", "output"} <= item.keys():
                messages.append(Message("user", check_text(item["input"], f"{here}.input", source)))
                messages.append(Message("assistant", check_text(item["output"], f"{here}.output", source)))
                continue
            if key.startswith("conversation") or item.get("from") is not None:
                tags = ("from", "value")
        messages.append(read_message(item, here, source, *tags, mapping))
    return messages


def read_history(row: dict[str, Any], source: str) -> list[Message]:
    """The turns before an instruction, of a column `history` with pairs of an instruction and its answer."""
    turns = []
    for number, pair in enumerate(optional_list(row.get("history"), "history", source)):
        key = f"history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"{source}: `{key}` should be a pair of texts, [instruction, answer]")
        turns.append(Message("user", check_text(pair[0], f"{key}[0]", source)))
        turns.append(Message("assistant", check_text(pair[1], f"{key}[1]", source)))
    return turns


def _says_something(value: Any) -> bool:
    """Whether a call is there; tables written out as JSON have an object of nulls where there is none."""
    if isinstance(value, dict):
        return any(item is not None for item in value.values())
    return not (value is None or (isinstance(value, str) and value.strip() in ("", "null")))


def _role(item: dict[str, Any], key: str, source: str, role_key: str, mapping: Mapping) -> str:
    said = item.get(role_key)
    expected = ", ".join((*mapping.roles, *ROLES))
    if said is None:
        other = next((name for name in item if name not in (role_key, "content", "value")), None)
        hint = f', or the key that holds it in data.columns, such as "{role_key}={other}"' if other else ""
        raise InputError(f"{source}: `{key}` has no `{role_key}`; expected one of {expected}{hint}")
    role = mapping.role(said)
    if role is None:
        raise InputError(
            f"{source}: `{key}.{role_key}` is {shown(said)}; expected one of {expected},"
            ' or a name for it in data.roles, such as "bot=assistant"'
        )
    return role


def _content(value: Any, key: str, source: str) -> str:
    if not isinstance(value, list):
        return check_text(value, key, source)
    texts = []
    for index, part in enumerate(value):
        here = f"{key}[{index}]"
        if not isinstance(part, dict) or (part.get("type") or "text") != "text":
            raise InputError(f'{source}: `{here}` should be {{"type": "text", "text": ...}}: only text can be trained')
        texts.append(check_text(part.get("text"), f"{here}.text", source))
    return "".join(texts)


def _weight(item: dict[str, Any], key: str, source: str) -> float | None:
    weight, train = (None if item.get(name) == "" else item.get(name) for name in ("weight", "train"))
    if weight is not None and train is not None:
        raise InputError(f"{source}: `{key}` has both `weight` and `train`; keep one")
    if weight is not None:
        return check_weight(weight, f"{key}.weight", source)
    if train is None:
        return float(item["loss"]) if isinstance(item.get("loss"), bool) else None
    if not isinstance(train, bool):
        raise InputError(f"{source}: `{key}.train` is {shown(train)}; expected true or false")
    return float(train)


def tools_of(row: dict[str, Any], source: str) -> tuple[dict[str, Any], ...]:
    """The descriptions of tools that stand beside a conversation."""
    return read_tools(row.get("tools"), "tools", source) or read_tools(row.get("functions"), "functions", source)


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
