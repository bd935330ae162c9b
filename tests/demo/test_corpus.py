"""The pretraining corpus: the same everywhere, and without what the held-out questions ask about."""

import hashlib
import json
import re

import pytest

from mora_jax.demo import ASSETS, TEXTS
from scripts.demo_model import corpus, instructions, world

FACTS = json.loads((ASSETS / "provenance.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def documents():
    """Every document that the embedded model was pretrained on."""
    return list(corpus.Corpus().documents(0, FACTS["corpus_documents"]))


@pytest.fixture(scope="module")
def held_out():
    return instructions.build()[1]


def test_it_is_the_corpus_of_the_embedded_model(documents):
    digest = hashlib.sha256()
    for text in documents:
        digest.update((json.dumps({"text": text}) + "\n").encode())
    assert digest.hexdigest() == FACTS["corpus_sha256"]


def test_no_held_out_question_occurs(documents, held_out):
    everything = "\n".join(documents)
    for question in held_out:
        assert question.instruction not in everything


def test_no_held_out_list_or_fact_occurs_in_any_order(documents, held_out):
    lists, facts = instructions.reserved(held_out)
    nouns = set(world.NOUNS)
    statement = re.compile(r"(\w+) has a (\w+) (\w+)\.")
    seen = 0
    for text in documents:
        for part in re.split(r"[.:]", text):
            words = part.split()
            if len(words) > 1 and nouns.issuperset(words):
                seen += 1
                assert frozenset(words) not in lists
        for name, colour, good in statement.findall(text):
            assert (name, good, colour) not in facts
    assert seen > len(documents)


def test_documents_for_the_perplexity_are_not_trained_on(documents):
    assert corpus.HELD_OUT[0] > len(documents)
    held_out = list(corpus.Corpus().documents(*corpus.HELD_OUT))
    assert not set(held_out) & set(documents)
    with open(TEXTS, encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == [{"text": text} for text in held_out]


def test_documents_fit(documents):
    longest = max(len(re.findall(r"\w+|[^\w\s]", text)) for text in documents[:2000])
    assert corpus.MAX_TOKENS - 12 < longest <= corpus.MAX_TOKENS


def test_another_seed_gives_other_text():
    assert corpus.Corpus(1).document(0) != corpus.Corpus(2).document(0)
