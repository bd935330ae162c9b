"""The benchmarks' front and what it knows of each; the GPU's program, lowered without one."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a script of the folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_every_benchmark_is_known_and_takes_what_it_is_called_with(load):
    known = load("run").benchmarks()
    scripts = {path.stem: path for path in FOLDER.rglob("*.py")}
    assert set(known) == {name for name, path in scripts.items() if "__main__" in path.read_text()} - {"run"}
    for name, one in known.items():
        assert one.title, name
        options = set(re.findall(r'"(--[\w-]+)"', one.script.read_text(encoding="utf-8")))
        assert {word for word in f"{one.call} {one.quick or ''}".split() if word.startswith("--")} <= options, name


def test_front_writes_table_and_figures(load, tmp_path, monkeypatch, capsys):
    run = load("run")
    shutil.copy(FOLDER / "quality" / "data_table.py", tmp_path)
    (tmp_path / "broken.py").write_text('"""Breaks."""\nQUICK = "--small"\nprint("half")\nraise SystemExit(3)\n')
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--out", str(out)])
    assert run.main() == 1
    said = capsys.readouterr()
    assert "[2 of 2" in said.out and said.err.splitlines()[-1].endswith("run: broken")
    figures = json.loads((out / "data_table.json").read_text())
    assert figures["exit_code"] == 0 and figures["machine"]["cores"] >= 1 and figures["machine"]["versions"]["jax"]
    first = figures["tables"][0]
    assert first["columns"][:2] == ["file", "tokenizer"] and first["rows"][0][0] == "instructions_train.jsonl"
    assert "| instructions_train.jsonl |" in (out / "data_table.md").read_text()
    figures = json.loads((out / "broken.json").read_text())
    assert (figures["exit_code"], figures["command"]) == (3, "benchmarks/broken.py --small")
    assert "half" in (out / "broken.md").read_text()


def test_turns_are_taken_and_timed(load):
    measuring = load("measuring")
    order = []
    turns = {name: lambda number, name=name: order.append((number, name)) for name in "ab"}
    turns["c"] = lambda number: (float(number), 2.0 * number)
    found = measuring.take_turns(turns, 3)
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b"), (3, "b"), (3, "a")]
    assert found["c"].wall == [1.0, 2.0, 3.0] and found["c"].median_cpu == 4.0 and found["c"].spread == "1–3"
    assert len(found["a"].cpu) == 3


def test_the_gpu_program_lowers_in_full_shapes(load, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    from mora_jax.backend import compiling_for
    from mora_jax.models.families import read_config
    from mora_jax.planning.model_shapes import read_model

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)  # this machine has none
    gpu = load("gpu_training")
    options = {"rank": 16, "length": 4096, "packed": False, "attention": "cudnn", "dtype": "bfloat16"}
    config = gpu.configuration(argparse.Namespace(micro_batches=2, **options), "mora-sharing", 2, "none")
    decoder = read_config(read_model("qwen2.5-7b"), "qwen2.5-7b")
    with compiling_for("gpu"):
        text = gpu.traced(decoder, config).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert re.search(r"tensor<28x3584x\d+xbf16>", text)


def test_results_name_their_commit_and_sources(load, capsys, monkeypatch):
    run, measuring = load("run"), load("measuring")
    known = run.benchmarks()
    for result in (*(FOLDER / "results").glob("*.md"), FOLDER / "results" / "plan_cells.json"):
        assert measuring.commits_of(result.read_text()), result.name
        assert run.script_of(result, known).is_file(), result.name
    files = {path.relative_to(FOLDER.parent).as_posix() for path in run.sources(known["decoding"].script)}
    assert {"benchmarks/decoding.py", "mora_jax/evaluation/generate.py", "mora_jax/models/decoder.py"} <= files
    assert not any(name.startswith("mora_jax/training/") for name in files)
    assert "long_context.py" in {path.name for path in run.sources(known["memory"].script)}


def git(folder, *arguments):
    settings = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_stale_results_are_listed(load, monkeypatch, tmp_path):
    run = load("run")
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    (tmp_path / "mora_jax").mkdir()
    (folder / "one.py").write_text('"""One."""\nfrom mora_jax import inner\n')
    (folder / "two.py").write_text('"""Two."""\n')
    (tmp_path / "mora_jax" / "inner.py").write_text("VALUE = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD").strip()
    for name in ("one", "two"):
        (folder / "results" / f"{name}.md").write_text(f"| a |\n\nMade at commit `{commit}`.\n")
    monkeypatch.setattr(run, "FOLDER", folder)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.stale() == []
    (tmp_path / "mora_jax" / "inner.py").write_text("VALUE = 2\n")
    [line] = run.stale()
    assert line.startswith("one.md") and line.endswith(
        "1 of 2 sources have changed, 2 lines, most in mora_jax/inner.py"
    )
    (folder / "results" / "two.md").write_text("| a |\n")
    (folder / "results" / "one.md").write_text("| a |\n\nMade at commit `0123456789ab`.\n")
    assert run.stale() == ["two.md: names no commit", "one.md: the commit 0123456789ab isn't known here"]


def test_the_stamp_names_what_stays_and_what_is_new(load, monkeypatch):
    measuring = load("measuring")
    monkeypatch.setattr(measuring, "commit", lambda: "new")
    monkeypatch.setattr(measuring, "versions_in_words", lambda: "2026-12-01, with jax 0.12.0.1")
    once = measuring.stamped("# T\n\n| a |\n")
    assert once == "# T\n\n| a |\n\nMade at commit `new`, 2026-12-01, with jax 0.12.0.1.\n"
    assert measuring.stamped(once, once) == once
    assert measuring.without_stamp(once).strip() == "# T\n\n| a |"
    both = measuring.stamped(once, "Made at commit `old`.\n")
    assert measuring.commits_of(both) == ["old", "new"] and "\nMade at commits `old`, `new`, 2026-12-01, with" in both


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.rglob("*.py") if "QUICK = " in path.read_text()))
def test_each_runs_in_small_sizes(load, tmp_path, name):
    run = load("run")
    asked = argparse.Namespace(model=None, data=None, other_python=None, out=tmp_path)
    obstacle = run.benchmarks()[name].obstacle(run.placeholders(asked, name), quick=True)
    if obstacle is not None:
        pytest.skip(f"{name} {obstacle}")
    command = [sys.executable, str(FOLDER / "run.py"), name, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / f"{name}.md").stat().st_size
