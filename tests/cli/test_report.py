"""report: runs beside each other in a terminal, as one object and as a page, and refusals."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.report import answers
from mora_jax.report.curves import smoothed, style_of
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.run.directory import RunDirectory


def write_run(folder, model_dir, losses, *, ended=True, adapter=False, **settings):
    """A run directory as `train` leaves it, after one step for each loss."""
    values = {"model.path": str(model_dir), "data.train": "rows.json", "out": str(folder)}
    values |= {name.replace("__", "."): value for name, value in settings.items()}
    config = lay_over(Config(), [(name, value, "test") for name, value in values.items()])
    directory = RunDirectory(folder)
    directory.files.make()
    directory.create(config, False)
    directory.append_metrics(
        [{"step": i + 1, "loss": loss, "tokens_per_second": 10.0} for i, loss in enumerate(losses)]
    )
    scores = {"eval_loss": losses[-1] + 1, "eval_perplexity": 2.0, "eval_arc_easy_acc": 0.25, "eval_tokens": 7}
    directory.append_metrics([{"step": len(losses), **scores}])
    if ended:
        summary = {"method": config.adapter.method, "trainable_parameters": 1234, "steps": len(losses)}
        summary |= {"final_loss": losses[-1], "eval_loss": losses[-1] + 1, "wall_seconds": 75.0}
        directory.write_json("summary.json", summary)
    directory.files.close()
    if adapter:
        model, _ = mj.load_pretrained(model_dir, dtype="float32")
        mj.attach(model, mj.LoRAConfig(rank=2, targets=["o_proj"]), rngs=nnx.Rngs(0))
        state = nnx.state(model, mj.AdapterParam)
        rng = np.random.default_rng(0)
        nnx.update(model, nnx.map_state(lambda _, leaf: leaf.replace(rng.normal(size=leaf.shape)), state))
        mj.save_adapter(model, folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model_dir):
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "a" / "lora", model_dir, [3.0, 2.0, 1.5], adapter=True, optimizer__learning_rate=1e-3)
    write_run(
        root / "<b>", model_dir, [3.0, 1.0], ended=False, adapter__method="mora", data__train=("x.json", "y.json")
    )
    return root


def test_a_table_of_results_and_one_of_settings(run, folders, monkeypatch):
    monkeypatch.chdir(folders)
    code, out, err = run("report", "a/lora", "<b>")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert "lora lora 1,234 3 1.5000 2.5000 2.00 10 1:15 0.25 done".split() in lines
    assert "<b> mora - 2 1.0000 2.0000 * 2.00 10 - 0.25 not ended: step 2".split() in lines
    assert ["adapter.method", "lora", "mora"] in lines
    assert ["optimizer.learning_rate", "0.001", "0.0002"] in lines
    assert any(line[0] == "data.train" and line[-1].endswith("y.json") for line in lines if line)


def answered(run, folders, data_file):
    arguments = ["--json", "--prompt", "Say it", "--prompts", data_file, "--samples", "1", "--max-new-tokens", "4"]
    code, out, err = run("report", folders / "a" / "lora", folders / "<b>", *arguments)
    assert code == 0 and "<b> does not answer: it has no result yet" in err
    return json.loads(out)


def test_one_object_with_answers(run, folders, data_file, monkeypatch):
    def generate_batch(model, tokenizer, prompts, *, max_new_tokens, template):
        return [f"{bool(jax.tree.leaves(nnx.state(model, mj.AdapterParam)))} {prompt[-1].text}" for prompt in prompts]

    monkeypatch.setattr(answers, "generate_batch", generate_batch)
    found = answered(run, folders, data_file)
    assert [one["run"] for one in found["runs"]] == ["lora", "<b>"]
    assert found["differences"]["adapter.method"] == ["lora", "mora"] and "out" not in found["differences"]
    text, sample = found["answers"]
    assert (text["prompt"], text["reference"]) == ("Say it", None)
    assert (sample["prompt"], sample["reference"]) == ("Say the word red", "redred")
    assert text["answers"] == {"base": "False Say it", "lora": "True Say it"}


@pytest.mark.slow
def test_answers_are_what_generate_says(run, folders, data_file, model_dir):
    given = answered(run, folders, data_file)["answers"][0]["answers"]
    for name, adapter in (("base", []), ("lora", ["--adapter", folders / "a" / "lora"])):
        out = run("generate", "--model", model_dir, *adapter, "--prompt", "Say it", "--max-new-tokens", "4")[1]
        assert given[name].strip() == out.strip()
    assert given["base"] != given["lora"]


def test_a_page_that_needs_nothing(run, folders, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert run("report", folders / "a" / "lora", folders / "<b>", "--html", "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and "&lt;b&gt;" in page and "<b>" not in page and "<script" not in page
    assert page.count("default-src") == 1 and "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert run("report", folders / "a" / "lora", folders / "<b>", "--html", "page.html")[0] == 0
    assert (tmp_path / "page.html").read_text() == page


def test_a_sweeps_folder_is_all_of_its_runs_and_names_tell_them_apart(run, tmp_path, model_dir):
    for name in ("one", "two"):
        write_run(tmp_path / "sweep" / "runs" / name, model_dir, [1.0])
    write_run(tmp_path / "other" / "one", model_dir, [1.0])
    found = json.loads(run("report", tmp_path / "sweep", tmp_path / "other" / "one", "--json")[1])
    assert [one["run"] for one in found["runs"]] == ["runs/one", "runs/two", "other/one"]
    assert found["differences"] == {}


def test_a_run_that_evaluates_tasks_alone(run, tmp_path, model_dir):
    write_run(tmp_path / "one", model_dir, [2.0, 1.0], ended=False)
    metrics = tmp_path / "one" / "metrics.jsonl"
    steps = [line for line in metrics.read_text().splitlines() if "eval_loss" not in line]
    metrics.write_text("\n".join([*steps, json.dumps({"step": 2, "eval_arc_easy_acc": 0.5})]) + "\n")
    assert run("report", tmp_path / "one", "--html", tmp_path / "page.html")[0] == 0
    [found] = json.loads(run("report", tmp_path / "one", "--json")[1])["runs"]
    assert (found["eval_arc_easy_acc"], found["eval_loss"], found["final_loss"]) == (0.5, None, 1.0)


def test_refusals(fails, folders, tmp_path, data_file):
    assert "is no run: there is no such folder" in fails("report", tmp_path / "absent")
    assert "there is no config.json in it" in fails("report", tmp_path)
    page = tmp_path / "precious.txt"
    page.write_text("text")
    assert "is no web page" in fails("report", folders / "<b>", "--html", page)
    (tmp_path / "plain.txt").write_text("only text\n")
    assert "no answered conversation" in fails("report", folders / "<b>", "--prompts", tmp_path / "plain.txt")


def test_curves_are_running_means_and_runs_look_different():
    losses = [float(i % 2) for i in range(100)]
    by_hand = [np.mean(losses[max(0, i - 3) : i + 1]) for i in range(100)]
    np.testing.assert_allclose(smoothed(losses), by_hand)
    assert smoothed([3.0, 1.0]) == [3.0, 1.0]
    assert len({style_of(number)[:2] for number in range(16)}) == 16
