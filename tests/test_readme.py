"""What the README shows does run: each of its Python blocks alone, and its commands, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mora_jax import demo

ROOT = Path(__file__).resolve().parent.parent


def blocks(language: str) -> list[str]:
    """The code blocks of one language, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_each_python_example_runs_alone(number, folder, capsys):
    block = blocks("python")[number]
    assert block.count(MODEL) == ("finetune" in block)  # an id of the hub, once
    block = block.replace(MODEL, demo.model_path()).replace("steps=8", "steps=2")  # as good as eight
    # What writes folders runs a second time over what it wrote.
    for _ in range(1 + ("save_pretrained" in block)):
        scope: dict[str, object] = {}
        exec(compile(block, f"README.md, Python block {number + 1}", "exec"), scope)
    printed = capsys.readouterr().out
    if "save_pretrained" in block:
        assert (folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
        assert (folder / "out" / "merged" / "model.safetensors").is_file()
    else:
        assert "before: " in printed and "after: " in printed
        assert re.search(r"(trained: |are trained \()[0-9.]+ ?%", printed)
    if "losses" in scope:
        assert scope["losses"][-1] < scope["losses"][0] / 2


def test_the_first_example_is_short():
    (lines,) = (block for block in blocks("python") if "generate_batch" in block)
    assert len([line for line in lines.splitlines() if line and "import" not in line]) <= 8


@pytest.mark.slow
def test_commands(folder):
    (script,) = (block for block in blocks("sh") if "mora-jax train" in block)
    program = folder / "bin" / "mora-jax"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W error -m mora_jax "$@"\n')
    program.chmod(0o755)
    # Two steps tell as much as sixty about the words of the command.
    script = script.replace("--config.train.steps=60", "--config.train.steps=2").replace(MODEL, demo.model_path())
    done = subprocess.run(
        ["bash", "-euxc", script],
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "runs" / "mora" / "summary.json").read_text())
    assert summary["method"] == "mora"
    assert summary["compilations"] == 1
    (scores,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert scores["perplexity"] > 1
    assert (folder / "merged" / "model.safetensors").is_file()
