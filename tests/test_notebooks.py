"""The notebooks are stored with what came out when they were run, agree with their text, and run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from scripts.run_notebooks import digest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REMEDY = "python scripts/run_notebooks.py brings it into step"
#: A path from the root with at least two names, as in `/home/me`; not a closing tag, a share or a web address.
MACHINE_PATH = re.compile(r"(?<![\w<:/.])/\w[\w.-]*/\w")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_three():
    assert {path.stem for path in NOTEBOOKS} == {"quickstart", "methods_side_by_side", "loss_tokens"}
    assert {path.stem for path in (ROOT / "notebooks").glob("*.py")} == {path.stem for path in NOTEBOOKS}


@every_notebook
def test_stored_outputs_are_whole(path):
    assert path.stat().st_size < 400_000
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
