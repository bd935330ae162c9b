"""report: runs beside each other in a terminal, as one object and as a page, and refusals."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.display.figures import style
from mora_jax.report import answers
from mora_jax.report.page import smoothed
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.run.directory import RunDirectory


def write_run(folder, model_dir, losses, *, ended=True, adapter=False, **settings):
    """A run directory as `train` leaves it, after one step for each loss."""
    values = {
        "model.path": str(model_dir),
        "data.train": "rows.json",
        "data.eval": ("held_out.json",),
        "out": str(folder),
    }
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
    scores = {"step": 2, "eval_arc_easy_acc": 0.5, "eval_arc_easy_acc_stderr": 0.125}
    metrics.write_text("\n".join([*steps, json.dumps(scores)]) + "\n")
    assert run("report", tmp_path / "one", "--html", tmp_path / "page.html")[0] == 0
    [found] = json.loads(run("report", tmp_path / "one", "--json")[1])["runs"]
    assert (found["eval_arc_easy_acc"], found["eval_loss"], found["final_loss"]) == (0.5, None, 1.0)
    text = run("report", tmp_path / "one")[1]
    assert "0.5 ± 0.12" in text and "stderr" not in text


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
    looks = [style(number) for number in range(33)]
    assert len({(look["color"], look["linestyle"]) for look in looks[:32]}) == 32
    for one, other in zip(looks, looks[1:], strict=False):
        assert all(one[part] != other[part] for part in one)


def test_a_star_needs_the_same_evaluation_data(run, tmp_path, model_dir):
    write_run(tmp_path / "a", model_dir, [2.0], data__eval=("held_out.json",))
    write_run(tmp_path / "b", model_dir, [1.0], data__eval=("other.json",))
    # Training data doesn't count beside data.eval.
    write_run(tmp_path / "c", model_dir, [1.5], data__eval=("other.json",), data__train="more.json", seed=3)
    write_run(tmp_path / "d", model_dir, [1.5], seed=3, data__eval=None, data__eval_fraction=0.5)
    write_run(tmp_path / "e", model_dir, [1.0], seed=4, data__eval=None, data__eval_fraction=0.5)
    for name, beta in (("f", 0.1), ("g", 0.2)):
        pairs = {"loss__objective": "dpo", "loss__beta": beta, "data__eval": ("pairs.json",)}
        write_run(tmp_path / name, model_dir, [1.0], **pairs)
    for names, starred in (("ab", ""), ("bc", "b"), ("abc", ""), ("de", ""), ("c", ""), ("dd", ""), ("fg", "")):
        out = run("report", *(tmp_path / name for name in names))[1]
        stars = [line.split()[0] for line in out.splitlines() if " * " in line]
        assert stars == list(starred), names
        assert ("of different data" in out) == (names in ("ab", "abc", "de", "fg"))
    # Where the tokens themselves are known, they decide.
    for name, tokens in (("a", "x"), ("b", "x"), ("c", "y")):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        (tmp_path / name / "summary.json").write_text(json.dumps(summary | {"eval_data": tokens}))
    assert "2.0000 *" in run("report", tmp_path / "a", tmp_path / "b")[1]
    # Figures of a resumed run say what they are of.
    assert "resumed" not in run("report", tmp_path / "a", tmp_path / "b")[1]
    (tmp_path / "b" / "summary.json").write_text(json.dumps(summary | {"resumed_after": 1500}))
    out = run("report", tmp_path / "a", tmp_path / "b")[1]
    assert "1,500" in out and "of a resumed run tokens/s and time are those of its last process" in out
    (tmp_path / "b" / "summary.json").write_text(json.dumps(summary | {"eval_data": "x"}))
    assert "different data" in run("report", tmp_path / "b", tmp_path / "c")[1]


def test_names_that_mean_something_elsewhere(run, tmp_path, model_dir, monkeypatch):
    """A run that is called like the base model, names with `$` and a leading `_`."""
    monkeypatch.setattr(answers, "generate_batch", lambda model, *rest, **options: ["yes"])
    write_run(tmp_path / "base", model_dir, [2.0], adapter=True)
    write_run(tmp_path / "base two", model_dir, [2.0], adapter=True)
    runs = tmp_path / "base", tmp_path / "base two"
    found = json.loads(run("report", *runs, "--prompt", "Say it", "--json", "--max-new-tokens", "1")[1])
    names = [one["run"] for one in found["runs"]]
    assert names == [f"{tmp_path.name}/base", f"{tmp_path.name}/base two"]
    assert found["answers"][0]["answers"] == dict.fromkeys(["base", *names], "yes")

    pytest.importorskip("matplotlib")
    odd = ["$x$", "a$_$b$c", "_hidden", "日本 ✓"]
    for name in odd:
        write_run(tmp_path / name, model_dir, [2.0, 1.0])
    assert run("report", *(tmp_path / name for name in odd), "--html", tmp_path / "page.html")[0] == 0
    drawn = (tmp_path / "page.html").read_text().partition("<svg")[2].partition("</svg>")[0]
    assert all(f">{name}</text>" in drawn for name in odd)


def test_damaged_files(run, fails, tmp_path, model_dir):
    folder = write_run(tmp_path / "one", model_dir, [3.0, 2.0, 1.0], ended=False)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().split(b"\n")
    odd = [
        b'{"step": 2, "loss": NaN}',
        b"[1]",
        b"null",
        b"\xff\xfe",
        b'{"loss": 1}',
        b'{"step": 2, "lo',
        b'{"step": 2, "loss": "high"}',
    ]
    metrics.write_bytes(b"\n".join([*lines[:1], *odd, *lines[1:]]) + b'{"step": 4, "lo')
    code, out, err = run("report", folder, "--json", "--html", tmp_path / "page.html")
    assert code == 0 and err.count("note: ") == 1
    assert "metrics.jsonl: left out lines 3, 4, 5, 6, 7, which can't be read" in err
    [found] = json.loads(out)["runs"]
    assert (found["final_loss"], found["steps"]) == (1.0, 3)
    for text in ("[]", "3", "{", "\ud800"):
        (folder / "summary.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        assert f"{folder}/summary.json" in fails("report", folder)
    (folder / "summary.json").write_text('{"steps": "many", "eval_loss": [1], "wall_seconds": null, "method": 3}')
    [found] = json.loads(run("report", folder, "--json")[1])["runs"]
    assert (found["steps"], found["eval_loss"], found["wall_seconds"], found["method"]) == (3, 2.0, None, "3")
    assert run("report", folder)[0] == 0


@pytest.mark.parametrize("width", [80, 60, 40])
def test_numbers_are_not_broken_in_a_narrow_terminal(run, tmp_path, model_dir, monkeypatch, width):
    for name, rate in (("a-run-with-a-name-as-long-as-sweeps-give-them-rate=0.001", 1e-3), ("b", 1e-4)):
        write_run(tmp_path / name, model_dir, [3.0, 2.123456], optimizer__learning_rate=rate, adapter__rank=4)
    monkeypatch.setattr("mora_jax.display.tables.terminal_width", lambda: width)
    out = run("report", tmp_path / "a-run-with-a-name-as-long-as-sweeps-give-them-rate=0.001", tmp_path / "b")[1]
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    words = out.split()
    for number in ("1,234", "2.1235", "3.1235", "2.00", "1:15", "0.25", "0.001", "0.0001"):
        assert number in words, number
    assert sum(line.startswith("b ") for line in lines) > 1  # the name stands in each part
