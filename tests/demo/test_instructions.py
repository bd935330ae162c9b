"""The instruction set: right answers, and a held-out part that shares nothing with the training part."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mora_jax.demo import data_path
from scripts.demo_model import instructions, world


@pytest.fixture(scope="module")
def parts():
    return instructions.build()


def test_the_embedded_files_are_what_the_code_builds(parts):
    for part, questions in zip(("train", "held_out"), parts, strict=True):
        lines = Path(data_path(part)).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [question.row() for question in questions]


def test_building_twice_gives_the_same(parts):
    assert instructions.build() == parts


def test_every_task_has_held_out_questions(parts):
    train, held_out = parts
    counts = Counter(question.task for question in held_out)
    assert set(counts.values()) == {instructions.HELD_OUT_PER_TASK}
    assert len(counts) == len(instructions.TASKS) == 12
    assert set(counts) == {question.task for question in train}


def test_no_question_occurs_in_both_parts(parts):
    train, held_out = ({question.instruction for question in part} for part in parts)
    assert not train & held_out


def test_no_content_occurs_in_both_parts(parts):
    tasks = {task.name: task for task in instructions.TASKS}
    train, held_out = ({(q.task, instructions.subject(tasks[q.task], q.content)) for q in part} for part in parts)
    assert not train & held_out


def test_no_held_out_list_or_fact_is_in_any_training_question(parts):
    train, held_out = parts
    lists, facts = instructions.reserved(held_out)
    assert len(lists) > 100
    assert len(facts) == instructions.HELD_OUT_PER_TASK
    for question in train:
        for words in re.findall(r"wrote: ([^.]*)\.", question.instruction):
            assert frozenset(words.split()) not in lists
        for name, colour, good in re.findall(r"(\w+) has a (\w+) (\w+)\.", question.instruction):
            assert (name, good, colour) not in facts


def test_no_question_is_asked_twice(parts):
    for part in parts:
        assert max(Counter(question.instruction for question in part).values()) == 1


# Each answer once more, from the text of the question alone.
def _answer(task: str, text: str) -> str:
    words = "".join(re.findall(r"(?:wrote:|order:|go) ([^.]*)\.", text)).split()
    last = re.findall(r"\w+", text)[-1]
    if task == "repeat":
        return " ".join(words)
    if task == "reverse":
        return " ".join(reversed(words))
    if task == "sort":
        return " ".join(sorted(words))
    if task == "first":
        return words[0]
    if task == "last":
        return words[-1]
    if task == "count":
        return ("two", "three", "four", "five")[len(words) - 2]
    if task == "member":
        return "yes" if last in words else "no"
    if task == "fact":
        good, name = re.findall(r"The (\w+) of (\w+) is", text)[0]
        return re.findall(rf"{name} has a (\w+) {good}\.", text)[0]
    if task == "next":
        follows = [
            order[at + 3]
            for order in world.SEQUENCES.values()
            for at in range(len(order) - 3)
            if list(order[at : at + 3]) == words
        ]
        assert len(set(follows)) == 1, text
        return follows[0]
    if task == "opposite":
        word = re.findall(r"opposite of (\w+)", text)[0]
        pairs = [pair for pair in world.OPPOSITE_PAIRS if word in pair]
        assert len(pairs) == 1
        return pairs[0][1 - pairs[0].index(word)]
    if task == "kind":
        word = re.findall(r"An? (\w+)", text)[0]
        kind = next(kind for kind, nouns in world.KINDS.items() if word in nouns)
        return "an animal" if kind == "animal" else f"a {kind}"
    if task == "capitals":
        return re.findall(r"In capitals (\w+)", text)[0].upper()
    raise AssertionError(task)


def test_all_answers_are_right(parts):
    for question in [*parts[0], *parts[1]]:
        assert _answer(question.task, question.instruction) + "." == question.output, question.instruction


def test_yes_and_no_are_about_as_frequent(parts):
    for part in parts:
        answers = Counter(question.output for question in part if question.task == "member")
        assert 0.3 < answers["yes."] / answers.total() < 0.7
