"""The instruction set: right answers, and three parts that share nothing."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from mora_jax.demo import PARTS, data_path
from scripts.demo_model import instructions, world


class Question(NamedTuple):
    task: str
    instruction: str
    output: str


def rows(part):
    return [json.loads(line) for line in Path(data_path(part)).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def parts():
    """The questions of the embedded files: to train on, held out, to report."""
    return [
        [Question(row["task"], *(message["content"] for message in row["messages"])) for row in rows(part)]
        for part in PARTS
    ]


def test_the_embedded_files_are_what_the_code_builds():
    """For the test part, which needs the corpus, `test_corpus.py` has the same."""
    for part, questions in zip(PARTS, instructions.build(), strict=False):
        assert rows(part) == [question.row() for question in questions]


def test_every_task_has_twenty_questions_to_choose_by_and_to_report(parts):
    train, *others = parts
    for part in others:
        counts = Counter(question.task for question in part)
        assert set(counts.values()) == {20}
        assert len(counts) == len(instructions.TASKS) == 12
        assert set(counts) == {question.task for question in train}


def test_no_question_occurs_in_two_parts(parts):
    questions = [question.instruction for part in parts for question in {q.instruction: q for q in part}.values()]
    assert max(Counter(questions).values()) == 1


def contents(question):
    """What a question's text is about: facts, a list in any order, or the words and the task."""
    text = question.instruction
    if facts := re.findall(r"(\w+) has a (\w+) (\w+)\.", text):
        return set(facts)
    if words := re.findall(r"wrote: ([^.]*)\.", text):
        return {frozenset(words[0].split())}
    (words,) = re.findall(r"(?:order:|They go|opposite of|^An?|In capitals) (\w+(?: \w+)*?)(?= is|[:?.])", text)
    return {(question.task, words)}


def test_no_content_occurs_in_two_parts(parts):
    train, held_out, test = (set().union(*map(contents, part)) for part in parts)
    assert len(test) == 7 * 20 + 2 * 20 + 20 + 3 * 10
    assert not test & (train | held_out)
    # Of the held-out facts it's the one asked for that nobody else states.
    beside = {
        fact
        for question in parts[1]
        for fact in contents(question)
        if question.task == "fact" and f"The {fact[2]} of {fact[0]} is" not in question.instruction
    }
    assert len(beside) == 20
    assert not train & (held_out - beside)


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
    for question in itertools.chain(*parts):
        assert _answer(question.task, question.instruction) + "." == question.output, question.instruction


def test_yes_and_no_are_about_as_frequent(parts):
    for part in parts:
        answers = Counter(question.output for question in part if question.task == "member")
        assert 0.3 < answers["yes."] / answers.total() < 0.7
