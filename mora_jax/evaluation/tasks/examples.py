"""Rows to examples: prompts with their shots, what is scored behind them, and the right answers."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mora_jax.data.read.files import DataFile, decode, open_bytes
from mora_jax.data.read.locate import locate
from mora_jax.data.read.validate import number_as_text
from mora_jax.errors import InputError
from mora_jax.evaluation.tasks.task import LABELS, Shape, Task

SEED = 0  # of the shots
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        where: file and row, for messages.
        row: its number in the file, from 1.
        id: a digest of the row.
        prompt: the text before the answer, shots included; for `partial` the shots alone, for `text` the text itself.
        turns: the shots of a chat, (user, assistant).
        choices: of a multiple choice the choices, of `partial` the contexts, of `continuation` the target alone.
        continuation: of `partial`, what follows each of them.
        answer: the number of the right choice; None where there are none.
        truths: the right answers of `generate`.
    """

    where: str
    row: int
    id: str
    prompt: str
    turns: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = ()
    continuation: str = ""
    answer: int | None = None
    truths: tuple[str, ...] = ()


def read_rows(data: Any, *, whole_texts: bool = False, **how: Any) -> list[tuple[str, int, dict[str, Any]]]:
    """Reads the rows of data files.

    Args:
        data: as for `locate`, files or rows in memory; `how` are its other arguments.
        whole_texts: whether a .txt file is one row rather than one a line.

    Returns:
        (where, number, row) of each; `where` is for messages.

    Raises:
        InputError: there are none, or one can't be read.
    """
    rows: list[tuple[str, int, dict[str, Any]]] = []
    origins = locate(data, **how)
    for origin in origins:
        if whole_texts and isinstance(origin, DataFile) and origin.name.lower().removesuffix(".gz").endswith(".txt"):
            with open_bytes(origin.path) as file:
                rows.append((origin.name, 1, {"text": decode(file.read(), origin.path, 1)}))
            continue
        for number, row in origin.rows():
            if isinstance(row, Exception):
                raise row
            if not isinstance(row, Mapping):
                raise InputError(f"{origin.name}, row {number}: a row must have named columns, found {row!r:.80}")
            rows.append((f"{origin.name}, row {number}", number, dict(row)))
    if not rows:
        raise InputError(f"{', '.join(origin.name for origin in origins)}: there are no rows to evaluate on")
    return rows


def make_examples(
    task: Task, rows: Sequence[tuple[str, int, dict[str, Any]]], *, shots: int = 0, limit: int | None = None
) -> list[Example]:
    """Makes the examples of a task.

    Args:
        task: says how.
        rows: as `read_rows` gives them; shots are drawn from all of them, never the example itself.
        shots: how many solved examples stand before each, drawn with a fixed seed.
        limit: takes so many rows, drawn with a fixed seed, in their order; None: all. Files are often sorted by subject
            or answer. Fewer rows are some of those that more would be.

    Raises:
        InputError: rows lack columns, an answer is outside of the choices, or there are too few rows for the shots.
    """
    if shots and task.type == "text":
        raise InputError(f"task {task.name} scores whole texts, before which no shots can stand; leave out --shots")
    shapes = [task.shape_of(row, where) for where, _, row in rows]
    labels = _labels(shapes, rows)
    wanted = sorted(np.random.default_rng(SEED).permutation(len(rows))[:limit].tolist())
    needed = range(len(rows)) if shots else wanted
    solved = {index: _example(task, shapes[index], *rows[index], labels) for index in needed}
    if not shots:
        return [_with_shots(task, solved[index], (), rows[index]) for index in wanted]
    members: dict[Any, list[int]] = {}
    for index, (_, _, row) in enumerate(rows):
        members.setdefault(_group(task, row), []).append(index)
    examples = []
    for index in wanted:
        others = [other for other in members[_group(task, rows[index][2])] if other != index]
        if len(others) < shots:
            group = "" if task.group is None else f" of its {task.group}"
            raise InputError(f"{rows[index][0]}: {shots} shots need as many other rows{group}, there are {len(others)}")
        drawn = np.random.default_rng([SEED, index]).choice(len(others), shots, replace=False)
        examples.append(_with_shots(task, solved[index], [solved[others[number]] for number in drawn], rows[index]))
    return examples


def pairs_of(example: Example, task: Task) -> Iterator[tuple[str, str]]:
    """The (context, continuation) pairs that are scored for an example of choices."""
    for choice in example.choices:
        if task.type == "partial":
            yield example.prompt + choice, task.delimiter + example.continuation
        else:
            yield example.prompt, task.delimiter + choice


def _group(task: Task, row: Mapping[str, Any]) -> Any:
    return None if task.group is None else json.dumps(row[task.group], sort_keys=True, default=str)


def _labels(shapes: Sequence[Shape], rows: Sequence[tuple[str, int, dict[str, Any]]]) -> list[Any]:
    """All answers of the file, where a shape asks for them."""
    labels: dict[str | float, None] = {}
    for shape, (where, _, row) in zip(shapes, rows, strict=True):
        if shape.uses_labels and LABELS not in row:
            label = shape.read("answer", row, where)
            if not isinstance(label, str | int | float):
                raise InputError(f"{where}: a label must be a text or a number, found {label!r:.80}")
            labels[label] = None
    return sorted(labels, key=lambda label: (isinstance(label, str), label))


def _example(task: Task, shape: Shape, where: str, number: int, row: dict[str, Any], labels: Sequence[Any]) -> Example:
    """An example without its shots."""

    def read(name: str) -> Any:
        return shape.read(name, row, where, labels)

    def texts(name: str) -> tuple[str, ...]:
        value = read(name)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise InputError(f"{where}: {name} must be a list of texts, found {value!r:.80}")
        return tuple(value)

    digest = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()[:12]
    example = functools.partial(Example, where, number, digest)
    if task.type == "text":
        return example(read("text"))
    if task.type == "continuation":
        return example(read("prompt"), choices=(read("target"),))
    if task.type == "generate":
        value = read("answer")
        truths = tuple(map(number_as_text, value if isinstance(value, list | tuple) else [value]))
        if not all(isinstance(truth, str) for truth in truths):
            raise InputError(f"{where}: an answer must be a text, a number or a list of them, found {value!r:.80}")
        return example(read("prompt"), truths=truths)
    if task.type == "partial":
        contexts = texts("contexts")
        answer = _answer(read("answer"), contexts, None, where)
        return example("", choices=contexts, continuation=read("continuation"), answer=answer)
    choices = texts("choices")
    names = read("names") if "names" in shape.sources else None
    return example(read("prompt"), choices=choices, answer=_answer(read("answer"), choices, names, where))


def _answer(value: Any, choices: Sequence[str], names: Sequence[Any] | None, where: str) -> int:
    """The number of the right choice, of its number, its name or itself."""
    if len(choices) < 2:
        raise InputError(f"{where}: there must be at least two choices, found {len(choices)}")
    if names is None and isinstance(value, int):  # also True and False
        if not 0 <= value < len(choices):
            raise InputError(f"{where}: the answer {value} is outside of the {len(choices)} choices, from 0")
        return int(value)
    known = choices if names is None else names
    if value in known:
        return list(known).index(value)
    raise InputError(f"{where}: the answer {value!r} is none of {', '.join(map(str, known))[:200]}")


def _with_shots(task: Task, example: Example, shots: Sequence[Example], source: tuple[str, int, dict]) -> Example:
    where, _, row = source
    before = task.describe(row, where) if task.description else ""
    if task.chat:
        turns = tuple((shot.prompt, _first_truth(shot)) for shot in shots)
        return replace(example, turns=turns, prompt=before + example.prompt)
    solved = "".join(_solved(task, shot) + _BETWEEN for shot in shots)
    return replace(example, prompt=before + solved + example.prompt)


def _solved(task: Task, shot: Example) -> str:
    if task.type == "partial":
        assert shot.answer is not None, "an example of choices has its answer"
        return shot.choices[shot.answer] + task.delimiter + shot.continuation
    answer = _first_truth(shot) if task.type == "generate" else shot.choices[shot.answer or 0]
    return shot.prompt + (task.delimiter + answer if answer else "")


def _first_truth(shot: Example) -> str:
    """The answer that a shot shows: nothing for a question that has none."""
    return shot.truths[0] if shot.truths else ""
