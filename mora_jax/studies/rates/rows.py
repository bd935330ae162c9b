"""Rows of questions and answers in three parts: to train on, to choose on, to report."""

from __future__ import annotations

import random
from pathlib import Path

from mora_jax import demo
from mora_jax.data import load_rows
from mora_jax.errors import InputError
from mora_jax.studies.folder import read_rows, write_rows
from mora_jax.studies.study import Sources
from mora_jax.studies.user_rows import as_messages, is_answered

TRAIN, HELD_OUT, TEST = demo.PARTS
#: Of a user's rows a tenth each is for choosing and for reporting, and at most so many.
_SHARE, _MOST = 0.1, 240


def write_parts(sources: Sources, folder: Path) -> dict[str, Path]:
    """The files of the three parts, by name; those of a user's rows are written unless they are there.

    Raises:
        InputError: the user's files hold no questions with answers, or too few.
    """
    if sources.data is None:
        return {part: Path(demo.data_path(part)) for part in demo.PARTS}
    found = {part: folder / f"{part}.jsonl" for part in demo.PARTS}
    if all(path.exists() for path in found.values()):
        return found
    rows = [as_messages(row) for row in load_rows(list(sources.data)) if is_answered(row)]
    few = min(_MOST, int(len(rows) * _SHARE))
    if not few:
        raise InputError(
            f"{', '.join(sources.data)}: {len(rows)} rows with an answer, which are too few for three parts"
        )
    random.Random("parts").shuffle(rows)
    for part, some in ((HELD_OUT, rows[:few]), (TEST, rows[few : 2 * few]), (TRAIN, rows[2 * few :])):
        write_rows(found[part], some)
    return found


def take(path: Path, count: int, seed: int, folder: Path) -> str:
    """A file of that many rows of another, drawn by the seed.

    Raises:
        InputError: there are not so many.
    """
    rows = read_rows(str(path))
    if count > len(rows):
        raise InputError(f"the study trains on {count} rows, and there are {len(rows)}; give more by --data")
    return write_rows(folder / f"rows_{count}_{seed}.jsonl", random.Random(f"rows {seed}").sample(rows, count))
