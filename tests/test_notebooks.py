"""The notebooks are stored with what came out when they were run, agree with their text, and run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.run_notebooks import INSTALL, REPOSITORY, badge, digest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REMEDY = "python scripts/run_notebooks.py brings it into step"
#: A path from the root with at least two names, as in `/home/me`; not a closing tag, a share or a web address.
MACHINE_PATH = re.compile(r"(?<![\w<:/.])/\w[\w.-]*/\w")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_each_has_its_text_and_a_row_in_the_docs():
    names = {path.stem for path in NOTEBOOKS}
    assert len(names) >= 7
    assert {path.stem for path in (ROOT / "notebooks").glob("*.py")} == names
    page = (ROOT / "docs" / "colab.md").read_text(encoding="utf-8")
    assert [name for name in sorted(names) if f"| `{name}.ipynb` |" not in page] == []


@every_notebook
def test_the_cell_that_installs_and_the_badge_are_the_same_in_all(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"]) == INSTALL, REMEDY
    assert badge(path.stem) in "".join(cells[0]["source"]), REMEDY
    code = "".join("".join(cell["source"]) for cell in cells[1:] if cell["cell_type"] == "code")
    assert not re.search(r"mora_jax\.[a-z_.]*\b_", code)  # names that are public


@pytest.mark.parametrize(
    ("found", "package", "flax"),
    [("wheel", "{folder}/mora_jax-9-py3-none-any.whl[plots]", False), ("", "mora-jax[plots] @ git+{url}", True)],
)
def test_the_cell_that_installs_keeps_jax(found, package, flax, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if found:
        (tmp_path / "mora_jax-9-py3-none-any.whl").touch()
    present = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mora_jax" else present(name))
    modules = {name: module for name, module in sys.modules.items() if flax or name != "flax"}
    monkeypatch.setattr(sys, "modules", modules)
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(INSTALL, {})
    (command,) = commands
    version = importlib.metadata.version
    assert command[-3] == package.format(folder=tmp_path, url=REPOSITORY)
    assert command[-2:] == [f"jax=={version('jax')}", f"jaxlib=={version('jaxlib')}"]
    assert ("restart the session" in capsys.readouterr().out) == flax


def test_launch_scripts_and_docs_take_the_same_address():
    for name in ("scripts/launch/tpu_vm.sh", "docs/colab.md"):
        assert REPOSITORY in (ROOT / name).read_text(encoding="utf-8"), name


@every_notebook
def test_stored_outputs_are_whole(path):
    assert path.stat().st_size < 500_000
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["metadata"].pop("outputs_of") == digest(code), REMEDY
    assert set(notebook["metadata"]) == {"kernelspec", "language_info", "jupytext"}  # no state of widgets
    check_outputs(notebook)


def check_outputs(notebook):
    """Every cell was run once, from the first to the last, and said nothing but results that show without a kernel."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), REMEDY
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}, "it failed"
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}, "it warns"
    data = [output["data"] for output in outputs if "data" in output]
    assert {kind for kinds in data for kind in kinds} <= {"text/plain", "text/html", "image/png"}, "not to be seen"
    assert any("image/png" in kinds for kinds in data), "no plot"
    texts = [*(output.get("text", "") for output in outputs), *(kinds.get("text/html", "") for kinds in data)]
    for text in map("".join, texts):
        assert not MACHINE_PATH.search(text), MACHINE_PATH.search(text)
        assert "Warning" not in text and "Traceback" not in text


@every_notebook
def test_text_and_notebook_agree(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    stored = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in cells]
    assert stored == cells_of(path.with_suffix(".py").read_text(encoding="utf-8")), REMEDY


def cells_of(text):
    """The cells of jupytext's percent format as (type, source), blank lines around them left out."""
    _, *cells = re.split(r"^# %%", text, flags=re.MULTILINE)
    found = []
    for cell in cells:
        head, _, body = cell.partition("\n")
        if head == " [markdown]":
            found.append(("markdown", re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip()))
        else:
            assert not head
            found.append(("code", body.strip()))
    return found


def test_a_difference_between_text_and_notebook_is_found():
    head = "# ---\n# jupyter: {}\n# ---\n\n"
    text = f"{head}# %% [markdown]\n# # Title\n#\n# - a list\n\n# %%\nx = 1  # %% no cell\n\n\n# %%\n# words\n"
    assert cells_of(text) == [("markdown", "# Title\n\n- a list"), ("code", "x = 1  # %% no cell"), ("code", "# words")]


@pytest.mark.slow
@every_notebook
def test_notebook_runs(path, monkeypatch):
    # Only `make test-all` installs what runs notebooks.
    from scripts.run_notebooks import run

    monkeypatch.delenv("XLA_FLAGS")  # one device, as a reader has
    check_outputs(run(path))
