"""Metrics and records of tasks against loops, with log-likelihoods that are given and a tiny model that generates."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from mora_jax.errors import InputError
from mora_jax.evaluation import LoglikelihoodScorer
from mora_jax.evaluation.loglikelihood import Loglikelihood
from mora_jax.evaluation.tasks.results import compare_with, result_table, write_results
from mora_jax.evaluation.tasks.run import metrics_of, run_task
from mora_jax.evaluation.tasks.task import load_task
from tests.evaluation.tasks.test_task import examples


class Given:
    """Scores that are looked up by continuation, or by context and continuation; `max_length` is in characters."""

    def __init__(self, table, max_length=100):
        self.table, self.max_length = table, max_length

    refusal = LoglikelihoodScorer.refusal

    def encode_pairs(self, pairs):
        return pairs

    def score(self, pairs, progress=None):
        found = [self.table.get(pair, self.table.get(pair[1])) for pair in pairs]
        return [Loglikelihood(logprob, correct == tokens, tokens, correct) for logprob, tokens, correct in found]

    def loglikelihood_rolling(self, texts, progress=None):
        return self.score([("", text) for text in texts], progress)


def run(name, rows, scorer, names=()):
    task, found = load_task(name), examples(name, *rows)
    return run_task(task, found, scorer, metrics=metrics_of(task, found, names))


def test_choices_are_normalised_in_four_ways():
    sizes = {"acc": 0, "acc_norm": 2, "acc_bytes": 2, "acc_token": 1}
    choices = ["a dog", "a big dog", "eine große Dogge"]
    table = {" a dog": (-6, 2, 0), " a big dog": (-7, 4, 0), " eine große Dogge": (-10, 5, 0)}
    rows = [{"query": "q", "choices": choices, "gold": gold} for gold in range(3)]
    found = run("arc_easy", rows, Given(table))
    for name, winner in sizes.items():
        assert [record[name] for record in found.records] == [int(gold == winner) for gold in range(3)]
        assert found.metrics[name].value == pytest.approx(1 / 3)
    # Characters and bytes differ: -2, -2.5 and -2, -1.25.
    table = {" ab": (-4, 1, 0), " éé": (-5, 1, 0)}
    record = run("arc_easy", [{"query": "q", "choices": ["ab", "éé"], "gold": 0}], Given(table)).records[0]
    assert (record["acc_norm"], record["acc_bytes"]) == (1, 0)
    assert record["loglikelihoods"] == [-4, -5]
    tied = run(
        "arc_easy", [{"query": "q", "choices": ["ab", "éé"], "gold": 0}], Given({" ab": (-4, 1, 0), " éé": (-4, 1, 0)})
    )
    assert tied.records[0]["prediction"] == 0


def test_labels_have_f1_and_a_confusion_matrix():
    gold, predicted = [0, 0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1, 2, 0]
    rows = [{"text": f"t{number}", "label": 10 * label} for number, label in enumerate(gold)]
    table = {
        (f"t{number}\nLabel:", f" {10 * label}"): (-1.0 if label == winner else -2.0, 1, 0)
        for number, winner in enumerate(predicted)
        for label in range(3)
    }
    found = run("classification", rows, Given(table))
    values = {name: one.value for name, one in found.metrics.items()}
    expected = {"acc": 0.5, "macro_f1": 0.355556, "micro_f1": 0.5, "weighted_f1": 0.516667}
    assert values == pytest.approx(expected, abs=1e-6)
    assert found.confusion == {"labels": ["0", "10", "20"], "matrix": [[3, 2, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]]}
    assert found.baselines == pytest.approx({"majority": 5 / 8, "chance": 1 / 3})
    shown = result_table(found).split("\n")
    assert shown[-5].split() == ["0", "10", "20"]
    expected = [[str(10 * place), *map(str, row[:3])] for place, row in enumerate(found.confusion["matrix"])]
    assert [line.split() for line in shown[-3:]] == expected


def test_words_and_texts():
    table = {" one": (-2.0, 1, 1), " two": (-4.0, 3, 1)}
    found = run("lambada", [{"context": "c", "continuation": word} for word in ("one", "two")], Given(table))
    values = {name: one.value for name, one in found.metrics.items()}
    expected = {"acc": 0.5, "perplexity": math.exp(3), "token_perplexity": math.exp(6 / 4), "token_accuracy": 0.5}
    assert values == pytest.approx(expected)
    found = run(
        "text", [{"text": "The cat sat."}, {"text": ""}], Given({"The cat sat.": (-9.0, 4, 1), "": (0.0, 0, 0)})
    )
    assert found.to_dict()["n"] == 1, "nothing is predicted in the empty text"
    values = {name: one.value for name, one in found.metrics.items()}
    expected = {"word_perplexity": 20.085537, "byte_perplexity": 2.117, "bits_per_byte": 1.082021}
    expected |= {"token_perplexity": math.exp(9 / 4), "token_accuracy": 0.25}
    assert values == pytest.approx(expected, abs=1e-6)
    assert found.notes == ["1 of 2 rows are not scored; the first is f.jsonl, row 2: the text has no tokens"]
    assert found.records[1].keys() == {"row", "id", "skipped"}
    with pytest.raises(InputError, match="task text: no row can be scored; the first is f.jsonl, row 1"):
        run("text", [{"text": ""}], Given({"": (0.0, 0, 0)}))


def test_rows_that_cannot_be_scored_are_named_and_end_nothing(tmp_path):
    rows = [
        {"query": "q", "choices": ["x", long, "y"], "gold": gold} for long, gold in (("z", 0), ("z" * 30, 1), ("z", 2))
    ]
    table = {" x": (-1, 1, 0), " y": (-2, 1, 0), " z": (-3, 1, 0)}
    found = run("arc_easy", rows, Given(table, 20))
    assert found.notes == [
        "1 of 3 rows are not scored; the first is f.jsonl, row 2: the continuation has 31 tokens, an input at most 20"
    ]
    assert found.to_dict()["n"] == 2 and found.to_dict()["skipped"] == 1
    assert found.metrics["acc"] == (0.5, 0.5, 2)
    assert found.baselines == {"majority": 0.5, "chance": pytest.approx(1 / 3)}
    everything = run("arc_easy", rows, Given(table | {" " + "z" * 30: (-0.5, 1, 0)}))
    assert everything.metrics["acc"].value == pytest.approx(2 / 3)
    write_results(tmp_path / "a", everything, {})
    compared = compare_with(tmp_path / "a", found, metrics_of(load_task("arc_easy"), examples("arc_easy", *rows)))
    assert (compared["acc"].value, compared["acc"].other, compared["acc"].difference) == (0.5, 0.5, 0)
    with pytest.raises(InputError, match="no row can be scored; the first is f.jsonl, row 1: the cont"):
        run("arc_easy", rows[1:2] * 2, Given(table, 20))
    cut = run("lambada", [{"context": "c" * 30, "continuation": "x"}], Given(table, 20))
    assert cut.notes == ["1 of 1 inputs have more than 20 tokens and lose their beginning"]


def test_line_separators_of_unicode_in_records(tmp_path):
    rows = [{"query": f"q\u2028\u2029\x85{n}", "choices": ["x", "y"], "gold": n} for n in range(2)]
    found = run("arc_easy", rows, Given({" x": (-1, 1, 0), " y": (-2, 1, 0)}))
    write_results(tmp_path / "a", found, {})
    assert (
        compare_with(tmp_path / "a", found, metrics_of(load_task("arc_easy"), examples("arc_easy", *rows), ["acc"]))[
            "acc"
        ].value
        == 0.5
    )


def test_metrics_that_do_not_fit_are_refused():
    row = {"query": "q", "choices": ["x", "y"], "gold": 0}
    with pytest.raises(
        InputError, match="arc_easy can't have the metric bleu; those of a multiple_choice task are acc"
    ):
        run("arc_easy", [row], Given({}), ["acc", "bleu"])
    with pytest.raises(InputError, match="macro_f1: it needs the same choices in every row"):
        run("arc_easy", [row, {**row, "choices": ["x", "z"]}], Given({}), ["macro_f1"])
    with pytest.raises(InputError, match="gives a acc|gives a perplexity of nan"):
        run("lambada", [{"context": "c", "continuation": "d"}], Given({" d": (math.nan, 1, 0)}), ["perplexity"])


@pytest.fixture
def says(monkeypatch):
    """A scorer whose model generates given texts."""

    def scorer(model, tokenizer, *texts):
        def complete(generator, prompts, *, max_new_tokens, **_):
            return [np.array(tokenizer(text)["input_ids"], int)[:max_new_tokens] for text in texts]

        monkeypatch.setattr("mora_jax.evaluation.tasks.run.complete_batch", complete)
        return SimpleNamespace(
            model=model, tokenizer=tokenizer, batch_size=2, max_length=128, encode=lambda texts: [[1]] * len(texts)
        )

    return scorer


def test_generated_answers_are_cut_and_checked(model, tokenizer, says):
    scorer = says(model, tokenizer, " The Cat.\nmore", " dog" * 30)
    rows = [{"context": "c", "question": "q", "answers": answers} for answers in (["dog", "cat"], [])]
    found = run("squad", rows, scorer)
    assert [record["prediction"] for record in found.records] == ["The Cat.", ("dog " * 12).strip()]
    values = {name: one.value for name, one in found.metrics.items()}
    assert values == {"exact_match": 0.5, "f1": 0.5, "cut_off": 0.5}
    solved = examples("squad", *rows, shots=1)
    assert [example.prompt.partition("\n\nBackground")[0] for example in solved] == [
        "Background: c\n\nQuestion: q\n\nAnswer:",
        "Background: c\n\nQuestion: q\n\nAnswer: dog",
    ]
    scorer = says(model, tokenizer, " 3+4=7.\n#### 7\n\nQuestion: 9", " It is $8.")
    found = run("gsm8k", [{"question": "q", "answer": f"x\n#### {n}"} for n in (7, 8)], scorer)
    numbers = run("gsm8k", [{"question": "q", "answer": n} for n in (7, 8.0)], scorer)
    assert [record["truths"] for record in numbers.records] == [["7"], ["8"]]
    assert numbers.metrics["flexible_match"].value == 1
    values = {name: one.value for name, one in found.metrics.items()}
    assert values == {"strict_match": 0.5, "flexible_match": 1.0, "unparsed": 0.0, "cut_off": 0.0}


def test_generation_with_a_model(model, tokenizer):
    scorer = LoglikelihoodScorer(model, tokenizer, batch_size=2)
    seen = []
    task = load_task("instruct")
    found = examples("instruct", *({"instruction": text, "output": "x"} for text in ("a", "b" * 200, "c")), shots=1)
    result = run_task(
        task, found, scorer, metrics=metrics_of(task, found), progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(2, 3), (3, 3)]
    assert result.to_dict()["n"] == 3
    assert {"row", "id", "prompt", "truths", "prediction", "exact_match", "f1", "cut_off"} == set(result.records[0])
