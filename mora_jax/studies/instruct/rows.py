"""Rows whose prompts are longer or shorter beside their answers, for the study of the loss over instructions.

The embedded questions come alone or with a passage in front of them, so that prompts change and answers don't. A user's
rows are sorted into groups by the ratio that they have.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax import demo
from mora_jax.data import EncodedDataset, load_rows
from mora_jax.data.loss_weights import normalize
from mora_jax.errors import InputError
from mora_jax.studies.folder import read_rows
from mora_jax.studies.user_rows import as_messages, is_answered

Rows = list[dict[str, Any]]
#: Parts of a user's prompts for validation and for the test.
_HELD_OUT = 0.15


@dataclass(frozen=True)
class Parts:
    """Rows to train on, to choose by and to report.

    Attributes:
        train, validation, test: rows of messages; no prompt is in two of them.
        duplicates: share of all rows whose prompt an earlier row has too.
    """

    train: Rows
    validation: Rows
    test: Rows
    duplicates: float = 0.0


def base_texts() -> Rows:
    """Texts like those of the base's pretraining that are no passages: the second half of `demo.TEXTS`."""
    rows = read_rows(demo.TEXTS)
    return rows[len(rows) // 2 :]


def embedded_parts(sentences: int, scored: int, seed: int) -> Parts:
    """The embedded questions, each behind a passage.

    Args:
        sentences: of a passage, in the order of their text; 0 for the question alone.
        scored: questions for validation, and for the test; the same for all seeds.
        seed: of the order of the training rows and of their passages. Questions are the same for any passage.
    """
    texts = [row["text"] for row in read_rows(demo.TEXTS)]
    passages = texts[: len(texts) // 2]
    # Passages of training come in no test, so that knowing them by heart is of no use there.
    first = len(passages) * 2 // 3

    def part(name: str, texts: Sequence[str], seed: int, count: int | None = None) -> Rows:
        rows = read_rows(demo.data_path(name))
        random.Random(f"{name} {seed}").shuffle(rows)
        draw = random.Random(f"{name} {seed} passages")
        return [_behind(row, _passage(draw, texts, sentences)) for row in rows[:count]]

    held_out = passages[first:]
    return Parts(
        part("train", passages[:first], seed), part("held_out", held_out, 0, scored), part("test", held_out, 0, scored)
    )


def _passage(draw: random.Random, texts: Sequence[str], sentences: int) -> str:
    if not sentences:
        return ""
    found = draw.choice(texts).rstrip(".").split(". ")
    start = draw.randrange(max(1, len(found) - sentences + 1))
    return ". ".join(found[start : start + sentences]) + ". "


def _behind(row: dict[str, Any], passage: str) -> dict[str, Any]:
    question, answer = row["messages"]
    return {"messages": [{**question, "content": passage + question["content"]}, answer]}


def parts_of_files(
    files: Sequence[str],
    tokenizer: Any,
    max_length: int,
    group: int,
    groups: int,
    scored: int,
    seed: int,
    template: str | None = None,
) -> Parts:
    """A user's rows in groups of equal size by their ratio of instruction to answer tokens, of which one is taken.

    Args:
        files: in any format that is recognised.
        tokenizer: of the model.
        max_length: longer rows are left out.
        group: from 1, the lowest ratios.
        groups: how many there are.
        scored: the most rows for validation, and for the test; the same for all seeds.
        seed: of the order of the training rows.
        template: as for `EncodedDataset.build`.

    Raises:
        InputError: the files hold too few rows with an instruction and an answer.
    """
    rows = [row for row in load_rows(files) if is_answered(row)]
    if not rows:
        raise InputError(f"{', '.join(files)}: no row with an instruction and an answer, which study instruct needs")
    report = EncodedDataset.build(rows, tokenizer, template, max_length=max_length).report
    ratios, prompts = np.asarray(report.ratios), report.prompts
    fits = np.flatnonzero(np.asarray(report.lengths) <= max_length)
    chosen = np.array_split(fits[np.argsort(ratios[fits], kind="stable")], groups)[group - 1]
    # Whole prompts are held out; in the order of the draw, which is the same for all groups and seeds.
    known = np.unique(prompts)
    order = dict(zip(known.tolist(), np.random.default_rng(0).permutation(len(known)) / len(known), strict=True))
    at = np.array([order[prompt] for prompt in prompts[chosen].tolist()])
    parts = [
        [as_messages(rows[index]) for index in chosen[(at >= low) & (at < high)].tolist()]
        for low, high in ((0, _HELD_OUT), (_HELD_OUT, 2 * _HELD_OUT), (2 * _HELD_OUT, 1))
    ]
    validation, test, train = parts
    random.Random(f"rows {seed}").shuffle(train)
    if not (train and validation and test):
        raise InputError(
            f"{', '.join(files)}: {len(fits)} rows with an instruction and an answer in {max_length} tokens are too "
            f"few for {groups} groups with a part for training, one for validation and one for the test"
        )
    return Parts(train, validation[:scored], test[:scored], report.duplicated_share)


def facts_of(rows: Rows, tokenizer: Any, max_length: int, template: str | None = None) -> dict[str, float]:
    """What the rows of a cell are like.

    Returns:
        `ratio`: instruction tokens an answer token, of the sums; `share`: mean over rows of the part of the answer
        and its end in the tokens of answer and instruction.
    """
    encoded = EncodedDataset.build(load_rows(rows), tokenizer, template, max_length=max_length)
    assert encoded.report.ratio is not None, "rows have answers"
    shares = [normalize(one.weights, one.segments, 1.0, "share")[1] / one.weights.sum() for one in encoded]
    return {"ratio": encoded.report.ratio, "share": float(np.mean(shares))}


def short_answers(path: str, words: int) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """The prompts and answers of the rows whose answer has at most so many words, which can be checked."""
    rows = [row["messages"] for row in read_rows(path)]
    short = [row for row in rows if len(row[-1]["content"].split()) <= words]
    return [row[:-1] for row in short], [row[-1]["content"] for row in short]


def facts_file(train: str) -> Path:
    """The file of facts beside a training file."""
    return Path(train).with_suffix(".facts.json")


def read_facts(train: str) -> dict[str, float]:
    """The facts beside a training file."""
    found: dict[str, float] = json.loads(facts_file(train).read_text(encoding="utf-8"))
    return found


def enough(rows: Rows, count: int, level: str) -> Rows:
    """The first rows.

    Raises:
        InputError: there are fewer.
    """
    if len(rows) < count:
        raise InputError(f"{level}: {len(rows)} rows are left to train on; give more data")
    return rows[:count]
