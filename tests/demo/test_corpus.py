"""The pretraining corpus: the same everywhere, and without what the held-out and test questions ask about."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from mora_jax.demo import ASSETS, TEXTS, data_path
from scripts.demo_model import corpus, instructions

FACTS = json.loads((ASSETS / "provenance.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def documents():
    """Every document that the embedded model was pretrained on."""
    return list(corpus.Corpus().documents(0, FACTS["corpus_documents"]))


@pytest.fixture(scope="module")
def said(documents):
    return corpus.said(documents)


def test_it_is_the_corpus_of_the_embedded_model(documents):
    digest = hashlib.sha256()
    for text in documents:
        digest.update((json.dumps({"text": text}) + "\n").encode())
    assert digest.hexdigest() == FACTS["corpus_sha256"]


def test_what_a_document_says():
    text = "Tom wrote: cat dog. Backwards: dog cat. Has cow: no. Mia has a red cup. Sam has a blue hat. The hat is wet."
    assert corpus.said([text, "Mia has a blue hat."]) == (
        {frozenset({"cat", "dog"})},
        {frozenset({("Mia", "cup", "red"), ("Sam", "hat", "blue")})},
    )


def test_no_question_about_single_words_occurs(documents):
    """Of the others no list and no pair of facts does."""
    everything = "\n".join(documents)
    for part in ("held_out", "test"):
        rows = [json.loads(line) for line in Path(data_path(part)).read_text(encoding="utf-8").splitlines()]
        asked = [
            row["messages"][0]["content"] for row in rows if row["task"] in ("next", "opposite", "kind", "capitals")
        ]
        assert len(asked) == 80
        assert not [question for question in asked if question in everything]


def test_no_held_out_list_or_fact_occurs_in_any_order(documents, said):
    _, held_out = instructions.build()
    lists, facts = instructions.reserved(held_out)
    assert len(lists) > 100
    assert not lists & said[0]
    assert len(facts) == 20
    everything = "\n".join(documents)
    for name, good, colour in facts:
        assert f"{name} has a {colour} {good}." not in everything


def test_the_test_part_is_drawn_from_what_the_corpus_does_not_say(said):
    test = instructions.build_test(*said)
    with open(data_path("test"), encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == [question.row() for question in test]
    lists, facts = instructions.reserved(test, both=True)
    assert len(lists) == 7 * 20
    assert not lists & said[0]
    pairs = {frozenset((q.content[:3], q.content[3:])) for q in test if q.task == "fact"}
    assert len(pairs) == 20
    assert not pairs & said[1]
    assert len(facts) == 40


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
