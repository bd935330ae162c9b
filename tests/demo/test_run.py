"""The demo from end to end on a tiny budget."""

import importlib.util
import json
import subprocess
import sys

import pytest
from flax import nnx

from mora_jax.adapters.attach import attach
from mora_jax.cli.main import main
from mora_jax.demo import cells, model_path, run
from mora_jax.demo.cells import Scores
from mora_jax.demo.show import COLUMNS, Question, Row
from mora_jax.interop import load_pretrained


@pytest.fixture
def one_method(monkeypatch):
    """LoRA only, two questions of each task and part."""
    small = [method for method in cells.METHODS if method.name == "LoRA"]
    complete = run.run

    def shortened(**settings):
        return complete(methods=small, questions=2, **settings)

    monkeypatch.setattr(run, "run", shortened)
    monkeypatch.setattr(cells, "WATCH_EVERY", 10)


def test_from_end_to_end(one_method, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(["demo", "--steps", "11", "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    lines = printed.out.splitlines()
    assert "The task: " in printed.err and "What next:" in printed.err
    assert lines[0].startswith("One question, and what each model answers: ")
    assert [line[:26].strip() for line in lines[1:5]] == [
        "right answer",
        "base model",
        "LoRA, masked",
        "LoRA, unmasked",
    ]
    lines = lines[6:]
    assert len(lines) == 5 + 3 + 1 + 2 + 2, printed.out
    assert {word for column in COLUMNS for word in column.split()} == {*lines[5].split(), *lines[6].split()}
    assert lines[-1].startswith("One seed")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in sorted(out.iterdir())] == ["curves.png", "results.json"]

    base, *tuned = json.loads((out / "results.json").read_text())
    assert base["exact_match"] <= 0.1
    assert [(row["method"], row["loss"]) for row in tuned] == [("LoRA", mode) for mode in ("masked", "unmasked")]
    for row in tuned:
        assert len(row["answers"]) == 2 * 12
        assert row["trainable_parameters"] > 0
        assert row["tokens_per_second"] > 0
        assert row["curve"]["steps"] == [0, 10, 11]
        # It starts where the base model is, and learns.
        assert row["curve"]["held_out_loss"][0] == pytest.approx(tuned[0]["curve"]["held_out_loss"][0])
        assert row["curve"]["held_out_loss"][-1] < row["curve"]["held_out_loss"][0] - 0.7
        assert row["response_perplexity"] < 0.5 * base["response_perplexity"]


def test_it_tells_all_the_time_how_far_it_is(one_method):
    told, lines = [], []
    run.run(steps=11, say=lines.append, report=lambda done, total, words=None: told.append((done, total, words)))
    counts = [done for done, *_ in told]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 22
    assert {total for _, total, _ in told} == {22}
    stages = [words for *_, words in told]
    assert stages[0] == "the base model answers"
    for mode in ("masked", "unmasked"):
        order = [
            stages.index(f"LoRA, {mode}: {what}") for what in ("compiling", "training", "answering the test questions")
        ]
        assert order == sorted(order)
    assert len(lines) == 5 and lines[0].startswith("The task: ")


@pytest.mark.parametrize("made", [False, True])
def test_stopped_early_it_leaves_no_empty_folder(monkeypatch, tmp_path, made):
    def stopped(**settings):
        assert (tmp_path / "deep" / "out").is_dir()
        raise KeyboardInterrupt

    if made:
        (tmp_path / "deep" / "out").mkdir(parents=True)
    monkeypatch.setattr(run, "run", stopped)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--out", "deep/out"]) == 130
    assert (tmp_path / "deep").exists() == made


def test_without_matplotlib_it_says_so(monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    scores = Scores(0.0, 0.0, {}, 9.0, 2.0, ("x",))
    results = [Row("base model", "-", scores), Row("LoRA", "masked", scores)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setattr(run, "run", lambda **settings: (results, [Question("x?", "x.")]))
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_bad_steps_are_one_line(steps, capsys):
    assert main(["demo", f"--steps={steps}"]) == 2
    assert capsys.readouterr().err.startswith("error:")


def test_methods_have_about_equal_parameters():
    trainable = {}
    for method in cells.METHODS:
        if method.name != "full":
            model, _ = load_pretrained(model_path())
            trainable[method.name] = attach(model, method.config, rngs=nnx.Rngs(0)).trainable
    assert max(trainable.values()) < 1.06 * min(trainable.values())


def test_help_imports_no_jax():
    code = (
        "import sys; from mora_jax.cli.main import main\n"
        "main(['demo', '--help'])\n"
        "assert not {'jax', 'flax', 'matplotlib'} & sys.modules.keys()"
    )
    assert "--steps" in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
