"""Generates the plain-text corpus that the demo's base model is pretrained on.

Documents of simple English sentences about the invented world: small stories, facts,
word lists and what can be said of them. No sentence is a question to the reader and
none has the form of a chat, so the base model knows patterns and facts but not how to
answer. Lists and facts that the held-out instructions ask about are never written. (The
test part is drawn from what is not written; see `instructions.build_test`.)
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator

from . import instructions, world

SEED = 11
_TOKENS = re.compile(r"\w+|[^\w\s]")
_FACT = re.compile(r"(\w+) has a (\w+) (\w+)\.")
#: The documents that are kept for measuring base-text perplexity: numbers, start and stop.
HELD_OUT = (10_000_000, 10_000_120)
#: A document holds as many sentences as fit into this many tokens (each word is one).
MAX_TOKENS = 62


class Corpus:
    """Document number -> text, the same on every machine."""

    def __init__(self, seed: int = SEED) -> None:
        self.seed = seed
        _train, held_out = instructions.build()
        self.reserved_lists, self.reserved_facts = instructions.reserved(held_out)
        self._paragraphs = (
            (self._list_notes, 24),
            (self._facts, 9),
            (self._story, 2),
            (self._sequence, 3),
            (self._kinds, 1),
            (self._opposites, 2),
            (self._capitals, 2),
        )

    def documents(self, start: int, stop: int) -> Iterator[str]:
        """Yields the documents `start` to `stop - 1`."""
        for number in range(start, stop):
            yield self.document(number)

    def document(self, number: int) -> str:
        """Writes one document: paragraphs of several kinds on one line."""
        rng = random.Random(f"{self.seed}/{number}")
        kinds, shares = zip(*self._paragraphs, strict=True)
        text: list[str] = []
        tokens = 0
        while True:
            for sentence in rng.choices(kinds, shares)[0](rng):
                tokens += len(_TOKENS.findall(sentence))
                if tokens > MAX_TOKENS:
                    return " ".join(text)
                text.append(sentence)

    # Each paragraph is a list of sentences.

    def _draw_list(self, rng: random.Random, low: int = 2, high: int = 5) -> list[str]:
        while True:
            size = rng.randint(low, high)
            words = rng.sample(world.NOUNS, size)
            if frozenset(words) not in self.reserved_lists:
                return words

    def _list_notes(self, rng: random.Random) -> list[str]:
        words = self._draw_list(rng)
        listed = world.join(words)
        opening = f"{rng.choice(world.NAMES)} wrote: {listed}."
        inside, outside = rng.choice(words), rng.choice(world.NOUNS)
        while outside in words:
            outside = rng.choice(world.NOUNS)
        count = world.NUMBERS[len(words) - 1]
        backwards, ordered = world.join(words[::-1]), world.join(sorted(words))
        notes = [
            f"Again: {listed}.",
            f"Backwards: {backwards}.",
            f"Sorted: {ordered}.",
            f"First: {words[0]}.",
            f"Last: {words[-1]}.",
            f"There are {count}.",
            f"Has {inside}: yes.",
            f"Has {outside}: no.",
        ]
        return [opening, *rng.sample(notes, rng.randint(4, 8))]

    def _facts(self, rng: random.Random) -> list[str]:
        count = rng.randint(2, 3)
        while True:
            names, goods = rng.sample(world.NAMES, count), rng.sample(world.GOODS, count)
            colours = rng.sample(world.COLOURS, count)
            facts = list(zip(names, goods, colours, strict=True))
            if not self.reserved_facts.intersection(facts):
                break
        text = [f"{name} has a {colour} {good}." for name, good, colour in facts]
        for name, good, colour in rng.sample(facts, count):
            text.append(f"The {good} of {name} is {colour}.")
        return text

    def _story(self, rng: random.Random) -> list[str]:
        name, friend = rng.sample(world.NAMES, 2)
        animal, food = rng.choice(world.KINDS["animal"]), rng.choice(world.KINDS["food"])
        place, good = rng.choice(world.KINDS["place"]), rng.choice(world.GOODS)
        quality = rng.choice(world.QUALITIES)
        openings = (
            f"One {rng.choice(world.DAYS)} {name} went to the {place}.",
            f"In {rng.choice(world.MONTHS)} {name} was at the {place} with {friend}.",
            f"{name} and {friend} lived near the {place}.",
        )
        meetings = (
            f"There {name} met {world.article(animal)} and it was {quality}.",
            f"They saw {world.article(animal)} under a tree.",
            f"{name} found {world.article(good)} and it was {quality}, not {world.OPPOSITE[quality]}.",
        )
        acts = (
            f"{name} gave the {animal} some {food}.",
            f"{friend} lost {world.article(good)}, but {name} found it again.",
            f"They ate {food} and looked at the {place}.",
        )
        ends = (
            f"Then {name} was happy and went home.",
            f'"Good night," said {friend}.',
            f"The {animal} was not sad any more.",
            "At the end they all went to sleep.",
        )
        return [rng.choice(part) for part in (openings, meetings, acts, ends)]

    def _sequence(self, rng: random.Random) -> list[str]:
        order = world.SEQUENCES[rng.choice(tuple(world.SEQUENCES))]
        length = rng.randint(4, 7)
        start = rng.randint(0, len(order) - min(length, len(order)))
        run = order[start : start + length]
        at = rng.randint(1, len(run) - 1)
        return [
            rng.choice((f"They go {world.join(run)} and so on.", f"In this order: {world.join(run)}.")),
            rng.choice((f"After {run[at - 1]} comes {run[at]}.", f"Next to {run[at - 1]} is {run[at]}.")),
        ]

    def _kinds(self, rng: random.Random) -> list[str]:
        nouns = rng.sample(world.NOUNS, 3)
        return [f"{_capital(world.article(noun))} is {world.article(world.KIND_OF[noun])}." for noun in nouns]

    def _opposites(self, rng: random.Random) -> list[str]:
        words = rng.sample(tuple(world.OPPOSITE), 2)
        return [f"The opposite of {word} is {world.OPPOSITE[word]}." for word in words]

    def _capitals(self, rng: random.Random) -> list[str]:
        words = rng.sample(world.NOUNS, 2)
        return [f"In capitals {word} is {word.upper()}." for word in words]


def said(documents: Iterable[str]) -> tuple[set[frozenset[str]], set[frozenset[instructions.Content]]]:
    """What documents say: (all word lists as sets, all pairs of facts that a document has)."""
    nouns = frozenset(world.NOUNS)
    lists: set[frozenset[str]] = set()
    pairs: set[frozenset[instructions.Content]] = set()
    for text in documents:
        for part in re.split("[.:]", text):
            words = part.split()
            if len(words) > 1 and nouns.issuperset(words):
                lists.add(frozenset(words))
        facts = [(name, good, colour) for name, colour, good in _FACT.findall(text)]
        pairs.update(frozenset(pair) for pair in itertools.combinations(facts, 2))
    return lists, pairs


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
