"""`mora-jax eval --task` as a user calls it."""

import json

import pytest

from mora_jax.evaluation import LoglikelihoodScorer
from mora_jax.interop import load_pretrained


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Ten questions of two choices."""
    path = tmp_path_factory.mktemp("questions") / "rows.jsonl"
    rows = [{"query": f"Question: {n}?", "choices": [f"one {n}", f"{n}, two"], "gold": n % 2} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_task_with_its_records_and_another_model(run, fails, model_dir, questions, tmp_path):
    call = ("eval", "--model", model_dir, "--task", "arc_easy", "--data", questions, "--batch-size", 1)
    call = (*call, "--dtype", "float32")
    code, out, err = run(*call, "--json", "--out", tmp_path / "a")
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == {"task", "n", "metrics"}
    assert (found["task"], found["n"]) == ("arc_easy", 10)
    assert all(set(one) == {"value", "stderr"} for one in found["metrics"].values())
    records = [json.loads(line) for line in (tmp_path / "a" / "records.jsonl").read_text().splitlines()]
    assert found["metrics"]["acc"]["value"] == sum(record["acc"] for record in records) / 10
    model, tokenizer = load_pretrained(model_dir, dtype="float32")
    pairs = [("Question: 3?\nAnswer:", " one 3"), ("Question: 3?\nAnswer:", " 3, two")]
    expected = [score.logprob for score in LoglikelihoodScorer(model, tokenizer, batch_size=1).loglikelihood(pairs)]
    assert records[3]["loglikelihoods"] == pytest.approx(expected, rel=1e-5)
    kept = json.loads((tmp_path / "a" / "result.json").read_text())
    assert kept["metrics"] == found["metrics"]
    assert kept["settings"]["model"] == model_dir

    compared = (*call, "--metrics", "acc,acc_norm", "--compare", tmp_path / "a")
    code, out, err = run(*compared)
    assert code == 0, err
    assert out.startswith("arc_easy, 10 examples\n  acc ")
    assert "+0.0000  [+0.0000, +0.0000]  McNemar p 1" in out
    assert "is not empty" in fails(*call, "--out", tmp_path / "a")
    assert "other examples (4 and 10, 4 of them in both)" in fails(*compared, "--limit", 4)
    assert "an evaluation of task arc_easy, not of piqa" in fails(*compared, "--task", "piqa")


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--task", "arc"], "there is no task 'arc'"),
        (["--task", "gsm8k"], "rows.jsonl, row 1: task gsm8k needs the columns answer, question; this row has query"),
        (["--task", "arc_easy", "--metrics", "f1"], "task arc_easy can't have the metric f1"),
        (["--task", "arc_easy", "--loss-mode", "full"], "--loss-mode can't be given with --task"),
        (["--task", "arc_easy", "--compare", "nowhere"], "nowhere holds no evaluation (No such file or directory)"),
        (["--task", "arc_easy", "--max-length", "999"], "beyond the model's context of 128 tokens"),
        (["--task", "arc_easy", "--fsdp", "3"], "devices"),
        (["--task", "arc_easy", "--limit", "0"], "--limit must be an integer, at least 1"),
        (["--shots", "2"], "--shots needs --task"),
    ],
)
def test_what_does_not_fit_is_refused(fails, model_dir, questions, changes, words):
    assert words in fails("eval", "--model", model_dir, "--data", questions, *changes)


def test_tasks_in_the_course_of_a_run(run, fails, model_dir, data_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": f"Say the word {n}"}) + "\n" for n in range(8)))
    settings = {"model.path": model_dir, "data.train": data_file, "out": "run", "optimizer.learning_rate": 0.05}
    settings |= {
        "train.steps": 2,
        "model.dtype": "float32",
        "adapter.targets": "q_proj",
        "train.batch_size": 4,
        "train.eval_every": 1,
        "data.max_length": 64,
        "mesh.data": 1,
    }
    settings |= {"train.eval_tasks": "lambada=words.jsonl", "train.eval_tasks_limit": 6}
    call = [f"--config.{name}={value}" for name, value in settings.items()]
    code, _, err = run("train", *call)
    assert code == 0, err
    assert "step 1/2  lambada_acc " in err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (row for row in rows if "eval_lambada_perplexity" in row)
    assert (first["step"], last["step"]) == (1, 2)
    assert first["eval_lambada_perplexity"] != pytest.approx(last["eval_lambada_perplexity"], rel=1e-2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_lambada_perplexity"] == last["eval_lambada_perplexity"]
    given = ("--task", "lambada", "--data", "words.jsonl", "--limit", 6, "--batch-size", 1)
    given = (*given, "--json", "--dtype", "float32")
    code, out, err = run("eval", "--model", model_dir, "--adapter", "run", *given)
    assert code == 0, err
    for name, one in json.loads(out)["metrics"].items():
        assert last[f"eval_lambada_{name}"] == pytest.approx(one["value"], rel=1e-4)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["eval_tasks"] == [f"lambada={tmp_path / 'words.jsonl'}"]
    call = [*call, "--config.out=other"]
    assert "'lambada' must be NAME=FILE" in fails("train", *call, "--config.train.eval_tasks=lambada")
    twice = "--config.train.eval_tasks=lambada=words.jsonl,lambada_openai=words.jsonl"
    assert "names task lambada twice" in fails("train", *call, twice)
    assert not (tmp_path / "other").exists()


def test_judged_answers_are_scored_as_training_scores_them(run, fails, model_dir, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {word}", "chosen": word * 2, "rejected": word[:1]} for word in ("red", "blue", "green")]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"model.path": model_dir, "model.dtype": "float32", "data.train": pairs, "data.eval": pairs}
    keys |= {"loss.objective": "dpo", "loss.beta": 0.5, "train.steps": 2, "train.batch_size": 3}
    keys |= {"optimizer.learning_rate": 0.1, "out": tmp_path / "run"}
    code, _, err = run("train", *(f"--config.{name}={value}" for name, value in keys.items()))
    assert code == 0, err
    trained = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])

    call = ("eval", "--model", model_dir, "--dtype", "float32", "--data", pairs)
    dpo = ("--objective", "dpo", "--beta", 0.5)
    code, out, err = run(*call, "--adapter", tmp_path / "run", *dpo, "--json")
    assert code == 0, err
    scores = json.loads(out)
    names = [name for name in trained if name.startswith("eval_")]
    assert {"eval_loss", "eval_margin", "eval_margin_stderr", "eval_kl"} <= set(names)
    for name in names:
        assert scores[name.removeprefix("eval_")] == pytest.approx(trained[name], rel=1e-4, abs=1e-6), name
    assert (scores["objective"], scores["beta"], scores["examples"]) == ("dpo", 0.5, 3)
    assert scores["margin"] > 0.01

    code, out, err = run(*call, "--objective", "simpo")
    assert code == 0, err
    assert out.startswith("simpo, beta 2, 3 examples\n  loss ")
    assert "give --adapter, or an objective without a reference" in fails(*call, *dpo)
    assert "give --objective too" in fails(*call, "--beta", 1)
    assert "the rows judge answers" in fails(*call)
