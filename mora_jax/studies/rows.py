"""Rows that studies write down, split and score."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from mora_jax import demo
from mora_jax.data import Conversation, EncodedDataset, Message, load_rows
from mora_jax.data.loss_weights import LossWeights
from mora_jax.errors import InputError
from mora_jax.evaluation.perplexity import DatasetScores, score
from mora_jax.paths import new_file
from mora_jax.studies.study import Measuring, Sources

Rows = list[dict[str, Any]]
TRAIN, HELD_OUT, TEST = demo.PARTS
_BATCH_SIZE = 64


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
        values: dict[str, Any] = {
            "role": message.role,
            "content": message.text,
            "name": message.name,
            "reasoning_content": message.reasoning,
            "tool_calls": list(message.tool_calls),
            "tool_call_id": message.tool_call_id,
        }
        messages.append({key: value for key, value in values.items() if value or key == "content"})
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
    part = dict.fromkeys(prompts, TRAIN) | dict.fromkeys(prompts[:few], HELD_OUT)
    part |= dict.fromkeys(prompts[few : 2 * few], TEST)
    parts: dict[str, Rows] = {name: [] for name in demo.PARTS}
    for row in rows:
        parts[part[prompt_of(row)]].append(dict(row))
    return parts


def sample(rows: Sequence[Mapping[str, Any]], count: int, seed: object = "sample") -> Rows:
    """As many rows, drawn by the seed, from each task alike where rows name their task; all where there are fewer.

    >>> [row["task"] for row in sample([{"task": "a"}] * 5 + [{"task": "b"}] * 5, 4)]
    ['a', 'a', 'b', 'b']
    """
    draw = random.Random(f"{seed}")
    order = draw.sample(range(len(rows)), len(rows))
    drawn: dict[object, list[int]] = {}
    for index in order:
        drawn.setdefault(rows[index].get("task"), []).append(index)
    # Round after round, one of each task.
    ranked = sorted(
        (rank, place, index) for place, group in enumerate(drawn.values()) for rank, index in enumerate(group)
    )
    return [dict(rows[index]) for index in sorted(index for *_, index in ranked[:count])]


def is_embedded(model: str) -> bool:
    """Whether a folder is that of the embedded model."""
    return os.path.realpath(model) == os.path.realpath(demo.model_path())


def texts_of(sources: Sources) -> str | None:
    """A file of texts like those that the base was pretrained on; None where none is known."""
    if sources.texts is not None:
        return sources.texts
    return demo.TEXTS if is_embedded(sources.model) else None


def score_rows(
    settings: Measuring,
    tokenizer: Any,
    model: Any,
    path: str | Path,
    *,
    mode: str = "masked",
    end_of_turn: str | None = None,
    max_length: int | None = None,
    part: str = "",
) -> DatasetScores:
    """The scores on a file of rows or texts; the file is read and encoded once.

    Args:
        settings: of the cell.
        tokenizer, model: of the cell.
        path: the file.
        mode: which tokens count, as `loss.mode`.
        end_of_turn: as `loss.end_of_turn`.
        max_length: tokens at which rows are cut; None for the cell's own.
        part: what the rows are called in the cell's file of single rows; empty to leave them out of it.
    """
    length = max_length or {**settings.preset.settings, **settings.data}["data.max_length"]
    key = str(path), mode, end_of_turn, length
    if key not in settings.cache:
        rows = EncodedDataset.build(load_rows(str(path)), tokenizer, settings.preset.template, max_length=length)
        settings.cache[key] = rows.with_loss(LossWeights(mode, end_of_turn=end_of_turn))
    rows = settings.cache[key]
    each = _item_writer(settings.items, part) if settings.items is not None and part else None
    return score(model, rows, batch_size=min(_BATCH_SIZE, len(rows)), each=each)


def _item_writer(file: Path, part: str) -> Callable[[np.ndarray, np.ndarray], None]:
    """Appends a line a row: its loss summed over tokens, their number, and how many were the likeliest."""

    def write(rows: np.ndarray, sums: np.ndarray) -> None:
        with file.open("a", encoding="utf-8") as lines:
            for row, (loss, _, right, tokens) in zip(rows.tolist(), sums[0].T.tolist(), strict=True):
                values = {"part": part, "row": row, "loss": loss, "tokens": int(tokens), "right": int(right)}
                lines.write(json.dumps(values) + "\n")

    return write
