"""Rows that studies write down, split and draw from."""

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from mora_jax import demo
from mora_jax.data import Conversation, Message
from mora_jax.errors import InputError
from mora_jax.paths import new_file

Rows = list[dict[str, Any]]
TRAIN, HELD_OUT, TEST = demo.PARTS


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes rows as JSON lines unless the file is there, and returns its path."""
    if not path.exists():
        with new_file(path) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path: str | Path) -> Rows:
    """The rows of a file that `write_rows` wrote."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def is_answered(row: Any) -> TypeGuard[Conversation]:
    """Whether a row ends with an answer to somebody."""
    if not isinstance(row, Conversation):
        return False
    *before, last = row.messages or (Message("user", ""),)
    return last.role == "assistant" and bool(last.text.strip()) and any(one.role == "user" for one in before)


def as_row(row: Conversation) -> dict[str, Any]:
    """A chat as a row of the format `messages`, with its calls of tools; a text as one of the format `text`."""
    if row.text is not None:
        return {"text": row.text}
    messages = []
    for message in row.messages:
        optional = {
            "name": message.name,
            "reasoning_content": message.reasoning,
            "tool_calls": list(message.tool_calls),
            "tool_call_id": message.tool_call_id,
        }
        given = {key: value for key, value in optional.items() if value}
        messages.append({"role": message.role, "content": message.text, **given})
    return {"messages": messages, **({"tools": list(row.tools)} if row.tools else {})}


def prompt_of(row: Mapping[str, Any]) -> str:
    """What is asked in a row of `as_row`; of a text all of it."""
    return row.get("text") or json.dumps(row["messages"][:-1])


def split_by_prompt(rows: Sequence[Mapping[str, Any]], share: float, what: str) -> dict[str, Rows]:
    """Rows in three parts, none of whose prompts is in two of them.

    Args:
        rows: of `as_row`.
        share: of prompts for the part to choose by, and for the part to report.
        what: the files, in messages.

    Raises:
        InputError: a part would be empty.
    """
    prompts = list(dict.fromkeys(map(prompt_of, rows)))
    few = int(len(prompts) * share)
    if not few:
        raise InputError(f"{what}: {len(rows)} rows with {len(prompts)} prompts are too few for three parts")
    random.Random("parts").shuffle(prompts)
    held_out, test = set(prompts[:few]), set(prompts[few : 2 * few])
    parts: dict[str, Rows] = {name: [] for name in demo.PARTS}
    for row in rows:
        prompt = prompt_of(row)
        parts[HELD_OUT if prompt in held_out else TEST if prompt in test else TRAIN].append(dict(row))
    return parts


def sample(rows: Sequence[Mapping[str, Any]], count: int, seed: object = "sample") -> Rows:
    """As many rows, drawn by the seed, from each task alike where rows name their task; all where there are fewer.

    >>> [row["task"] for row in sample([{"task": "a"}] * 5 + [{"task": "b"}] * 5, 4)]
    ['a', 'a', 'b', 'b']
    """
    tasks: dict[object, list[int]] = {}
    for index in random.Random(f"{seed}").sample(range(len(rows)), len(rows)):
        tasks.setdefault(rows[index].get("task"), []).append(index)
    # Round after round, one of each task.
    order = sorted((rank, task, index) for task, group in enumerate(tasks.values()) for rank, index in enumerate(group))
    return [dict(rows[index]) for index in sorted(index for *_, index in order[:count])]


def is_embedded(model: str) -> bool:
    """Whether a folder is that of the embedded model."""
    return os.path.realpath(model) == os.path.realpath(demo.model_path())
