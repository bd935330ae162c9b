"""Rows that a user gives, as studies write them down again."""

from __future__ import annotations

from typing import Any, TypeGuard

from mora_jax.data import Conversation, Message


def is_answered(row: Any) -> TypeGuard[Conversation]:
    """Whether a row ends with an answer to somebody."""
    if not isinstance(row, Conversation):
        return False
    *before, last = row.messages or (Message("user", ""),)
    return last.role == "assistant" and bool(last.text.strip()) and any(one.role == "user" for one in before)


def as_messages(row: Conversation) -> dict[str, Any]:
    """A chat as a row of the format `messages`, with its calls of tools."""
    messages = []
    for one in row.messages:
        said: dict[str, Any] = {
            "role": one.role,
            "content": one.text,
            "name": one.name,
            "reasoning_content": one.reasoning,
        }
        said |= {"tool_calls": list(one.tool_calls), "tool_call_id": one.tool_call_id}
        messages.append({key: value for key, value in said.items() if value or key == "content"})
    return {"messages": messages, **({"tools": list(row.tools)} if row.tools else {})}
