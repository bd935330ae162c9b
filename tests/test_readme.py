"""What the README shows does run: its Python blocks one after the other, and its commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mora_jax import demo

ROOT = Path(__file__).resolve().parent.parent


def blocks(language: str) -> list[str]:
    """The code blocks of one language, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the examples read: the embedded model and data under the README's names."""
    (tmp_path / "SmolLM2-135M-Instruct").symlink_to(demo.model_path())
    lines = Path(demo.data_path("train")).read_text(encoding="utf-8").splitlines()[:40]
    (tmp_path / "instructions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_examples(folder, capsys):
    scope: dict[str, object] = {}
    shown = blocks("python")
    # The one that writes folders runs a second time over what it wrote.
    (writing,) = (block for block in shown if "save_pretrained" in block)
    for number, block in enumerate([*shown, writing]):
        block = block.replace("steps=20", "steps=2")  # as good as twenty
        exec(compile(block, f"README.md, Python block {number + 1}", "exec"), scope)
    assert "mora: " in capsys.readouterr().out
    assert np.isfinite(np.asarray(scope["y"])).all()
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "out" / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_commands(folder):
    (script,) = (block for block in blocks("sh") if "mora-jax train" in block)
    program = folder / "bin" / "mora-jax"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W error -m mora_jax.cli.main "$@"\n')
    program.chmod(0o755)
    # Two steps tell as much as sixty about the words of the command.
    script = script.replace("--config.train.steps=60", "--config.train.steps=2")
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
