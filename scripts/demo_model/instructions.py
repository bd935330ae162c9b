"""The demo's instruction set: twelve kinds of question whose answers can be checked.

Each question asks about some *content* (a list of words, a fact, one word). There are three
parts: one to train on, one held out to choose by (validation), and one to report (test). No
two share a content, in any wording.

No list of the held-out and the test part can have been read anywhere. The pretraining corpus
leaves out the lists and facts of the held-out part (see :func:`reserved`); those of the test
part are drawn from what the corpus doesn't say (see :func:`build_test`). It says every pair of
words and every single fact that isn't reserved, so the test part has no list of two words,
and its facts are pairs that no document says together. Nearly each object of each name has
every colour somewhere, so a fact that was read doesn't tell the answer. The questions about single words (opposites,
kinds, capitals, what comes next) ask for what the corpus does state; there the base model knows
the answer, and learns from other words that it is asked for one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from . import world

SEED = 7
HELD_OUT_PER_TASK = TEST_PER_TASK = 20

Content = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """One instruction with the one right answer to it."""

    task: str
    content: Content
    instruction: str
    output: str

    def row(self) -> dict[str, object]:
        """The row of the data files: chat messages, and the task beside them."""
        return {
            "messages": [
                {"role": "user", "content": self.instruction},
                {"role": "assistant", "content": self.output},
            ],
            "task": self.task,
        }


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
      draw: makes one content at random, or `None` where `contents` lists them all.
      contents: every content there is, for tasks with few of them.
      answer: content -> answer, without the full stop that ends it.
      show: content -> what stands in the wording.
      wordings: the ways to ask.
      rows: number of training rows.
      kept: number of `contents` that only the test part asks about.
    """

    name: str
    answer: Callable[[Content], str]
    show: Callable[[Content], str]
    wordings: tuple[str, ...]
    draw: Callable[[random.Random], Content] | None = None
    contents: tuple[Content, ...] = ()
    rows: int = 240
    kept: int = TEST_PER_TASK


def _list(low: int, high: int) -> Callable[[random.Random], Content]:
    def draw(rng: random.Random) -> Content:
        return tuple(rng.sample(world.NOUNS, rng.randint(low, high)))

    return draw


def _member(rng: random.Random) -> Content:
    words = rng.sample(world.NOUNS, rng.randint(3, 5) + 1)
    return (rng.choice(words[1:]) if rng.random() < 0.5 else words[0], *words[1:])


def _fact(rng: random.Random) -> Content:
    """(name, object, colour) asked for, then the other (name, object, colour)."""
    names, goods = rng.sample(world.NAMES, 2), rng.sample(world.GOODS, 2)
    colours = rng.sample(world.COLOURS, 2)
    return (names[0], goods[0], colours[0], names[1], goods[1], colours[1])


def show_fact(content: Content) -> str:
    """Both facts as sentences, in an order that doesn't tell which one is asked for."""
    sentences = [f"{n} has a {c} {g}." for n, g, c in (content[:3], content[3:])]
    return " ".join(sorted(sentences))


def show_list(words: Content) -> str:
    """The list as somebody's sentence; whose depends on the words alone."""
    name = world.NAMES[sum(map(ord, "".join(words))) % len(world.NAMES)]
    return f"{name} wrote: {world.join(words)}."


def _windows() -> tuple[Content, ...]:
    """Every run of three in a sequence, with the one that follows it."""
    return tuple(tuple(order[i : i + 4]) for order in world.SEQUENCES.values() for i in range(len(order) - 3))


def _words(words: tuple[str, ...]) -> tuple[Content, ...]:
    return tuple((word,) for word in words)


TASKS: tuple[Task, ...] = (
    Task(
        "repeat",
        world.join,
        show_list,
        ("{} Again:", "{} Again?", "{} Say it: Again."),
        draw=_list(2, 5),
    ),
    Task(
        "reverse",
        lambda c: world.join(c[::-1]),
        show_list,
        ("{} Backwards:", "{} Backwards?", "{} Say it: Backwards."),
        draw=_list(3, 4),
    ),
    Task(
        "sort",
        lambda c: world.join(sorted(c)),
        show_list,
        ("{} Sorted:", "{} Sorted?"),
        draw=_list(3, 4),
    ),
    Task("first", lambda c: c[0], show_list, ("{} First:", "{} First?"), draw=_list(3, 5)),
    Task("last", lambda c: c[-1], show_list, ("{} Last:", "{} Last?"), draw=_list(3, 5)),
    Task(
        "count",
        lambda c: world.NUMBERS[len(c) - 1],
        show_list,
        ("{} There are:", "{} There are?"),
        draw=_list(2, 5),
    ),
    Task(
        "member",
        lambda c: "yes" if c[0] in c[1:] else "no",
        lambda c: f"{show_list(c[1:])} Has {c[0]}",
        ("{}:", "{}?"),
        draw=_member,
    ),
    Task(
        "fact",
        lambda c: c[2],
        lambda c: f"{show_fact(c)} The {c[1]} of {c[0]} is",
        ("{}:", "{}?"),
        draw=_fact,
    ),
    Task(
        "next",
        lambda c: c[3],
        lambda c: f"{world.join(c[:3])}. After {c[2]} comes",
        ("They go {}:", "In this order: {}:", "They go {}?", "In this order: {}?"),
        contents=_windows(),
    ),
    Task(
        "opposite",
        lambda c: world.OPPOSITE[c[0]],
        lambda c: c[0],
        (
            "The opposite of {} is:",
            "The opposite of {} is?",
            "The opposite of {}:",
            "The opposite of {}?",
            "Say the opposite of {}.",
        ),
        contents=_words(tuple(world.OPPOSITE)),
        kept=10,
    ),
    Task(
        "kind",
        lambda c: world.article(world.KIND_OF[c[0]]),
        lambda c: world.article(c[0]).capitalize(),
        ("{} is:", "{} is?", "{}:", "{}?"),
        contents=_words(world.NOUNS),
        kept=10,
    ),
    Task(
        "capitals",
        lambda c: c[0].upper(),
        lambda c: c[0],
        ("In capitals {} is:", "In capitals {} is?", "In capitals {}:", "In capitals {}?"),
        contents=_words(world.NOUNS),
        kept=10,
    ),
)


def subject(task: Task, content: Content) -> tuple[str, ...]:
    """What must not be shared between the parts.

    Lists count as sets of words, so that a held-out list isn't met in another order;
    of a fact it is the statement that is asked for; else the content itself.
    """
    if task.name == "fact":
        return content[:3]
    if task.name == "member":
        return tuple(sorted(set(content[1:])))
    if task.draw is not None:
        return tuple(sorted(content))
    return content


def _contents(task: Task, rng: random.Random) -> Iterator[Content]:
    """Contents with subjects that differ from each other, in random order."""
    if task.draw is None:
        yield from rng.sample(task.contents, len(task.contents))
        return
    seen: set[tuple[str, ...]] = set()
    while True:
        content = task.draw(rng)
        if subject(task, content) not in seen:
            seen.add(subject(task, content))
            yield content


def _kept(task: Task, seed: int) -> list[Content]:
    """The last contents, in the order of :func:`build`; none where they are drawn."""
    return [] if task.draw else list(_contents(task, random.Random(f"{seed}/{task.name}")))[-task.kept :]


def _ask(task: Task, content: Content, wording: str) -> Question:
    return Question(task.name, content, wording.format(task.show(content)), task.answer(content) + ".")


def build(seed: int = SEED) -> tuple[list[Question], list[Question]]:
    """Draws the training part and the held-out part.

    Returns:
      The training questions in random order, and the held-out ones by task. No
      subject of a held-out question belongs to a training question of the same task,
      and no list of a held-out question to any training question.
    """
    held_out: list[Question] = []
    sources: list[tuple[Task, Iterator[Content], random.Random]] = []
    for task in TASKS:
        rng = random.Random(f"{seed}/{task.name}")
        contents = _contents(task, rng)
        for _ in range(HELD_OUT_PER_TASK):
            held_out.append(_ask(task, next(contents), rng.choice(task.wordings)))
        sources.append((task, contents, rng))

    lists, _facts = reserved(held_out)
    train: list[Question] = []
    for task, contents, rng in sources:
        rows: list[Question] = []
        for content in contents:
            if task.draw is not None and task.name != "fact" and frozenset(subject(task, content)) in lists:
                continue
            if task.name == "fact" and any(f in _facts for f in (content[:3], content[3:])):
                continue
            # Few contents are asked in every wording, many in one each.
            wordings = task.wordings if task.draw is None else (rng.choice(task.wordings),)
            rows += [_ask(task, content, wording) for wording in wordings]
            if len(rows) >= task.rows:
                break
        train += rows[: task.rows]
    random.Random(seed).shuffle(train)
    kept = {(task.name, content) for task in TASKS for content in _kept(task, seed)}
    return [question for question in train if (question.task, question.content) not in kept], held_out


def build_test(
    said_lists: Set[frozenset[str]], said_pairs: Set[frozenset[Content]], seed: int = SEED
) -> list[Question]:
    """Draws the test part, with lists as long as those of the held-out part (those of two words get three).

    Args:
      said_lists: the word lists of the pretraining corpus, as sets.
      said_pairs: facts, (name, object, colour), that a document of it says together, two by two.
      seed: as given to :func:`build`.

    Returns:
      The questions by task. None of their lists is among `said_lists` or belongs to another
      question of any part; no fact does, and no two that a question states are among `said_pairs`.
    """
    train, held_out = build(seed)
    taken, facts = reserved([*train, *held_out], both=True)
    taken |= said_lists
    test: list[Question] = []
    for task in TASKS:
        rng = random.Random(f"{seed}/test/{task.name}")
        kept = _kept(task, seed)
        for content in kept:
            wordings = rng.sample(task.wordings, TEST_PER_TASK // len(kept))
            test += [_ask(task, content, wording) for wording in wordings]
        for like in held_out:
            if like.task != task.name or kept:
                continue
            length = max(3, len(like.content))
            while True:
                content = task.draw(rng)
                question = _ask(task, content, rng.choice(task.wordings))
                lists, stated = reserved([question], both=True)
                if len(content) == length and not lists & taken and not stated & facts and stated not in said_pairs:
                    break
            taken |= lists
            facts |= stated
            test.append(question)
    return test


def reserved(questions: list[Question], *, both: bool = False) -> tuple[set[frozenset[str]], set[Content]]:
    """What the pretraining corpus must leave out of the held-out `questions`: (word lists as sets, facts).

    `both` takes not only the fact that is asked for, but the one beside it too.
    """
    by_name = {task.name: task for task in TASKS}
    lists: set[frozenset[str]] = set()
    facts: set[Content] = set()
    for question in questions:
        task = by_name[question.task]
        if task.name == "fact":
            facts.add(question.content[:3])
            if both:
                facts.add(question.content[3:])
        elif task.draw is not None:
            lists.add(frozenset(subject(task, question.content)))
    return lists, facts


def write(questions: list[Question], path: Path) -> None:
    """Writes one JSON object a line."""
    lines = [json.dumps(question.row(), ensure_ascii=False) for question in questions]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
