"""Runs the notebooks and stores them with what came out, for people who read them without running them.

    pip install -e '.[notebook]'
    python scripts/run_notebooks.py [notebooks/NAME.ipynb …]

Each notebook is a pair: NAME.py, the text (jupytext's percent format), and NAME.ipynb, with outputs. Edit either of
them; here the newer one brings the other into step, then the notebook is run from its first cell to its last in an
empty folder, and stored.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
# Bars are for someone who looks on: the kernel begins with displays that show nothing.
QUIET = """
def quiet():
    import os
    from mora_jax.sweeps import board
    from mora_jax.training import display
    nowhere = open(os.devnull, "w")
    display.make_display = lambda: display.Display(nowhere)
    board.make_board = lambda: board.Board(nowhere)
quiet()
del quiet
"""


def main() -> None:
    """Runs what is named, or all."""
    import jupytext.cli
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    for path in parser.parse_args().notebooks or sorted(FOLDER.glob("*.py")):
        path = path.with_suffix(".ipynb")
        text = path.with_suffix(".py")
        jupytext.cli.jupytext(["--quiet", "--sync", str(text if text.exists() else path)])
        notebook = run(path)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB", file=sys.stderr)


def run(path: Path, timeout: int = 900) -> Any:
    """Returns the notebook as executed in an empty folder, without progress displays.

    Args:
        path: of the .ipynb file.
        timeout: seconds a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        work, ipython = Path(folder, "work"), Path(folder, "ipython")
        startup = ipython / "profile_default" / "startup" / "quiet.py"
        startup.parent.mkdir(parents=True)
        startup.write_text(QUIET, encoding="utf-8")
        work.mkdir()
        where = {"metadata": {"path": str(work)}}
        client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False, resources=where)
        client.coalesce_streams = True
        client.execute(env=os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(ipython)})
    for cell in notebook.cells:
        cell.metadata.clear()  # jupytext's notes on blank lines
    notebook.metadata |= {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "outputs_of": digest(cell.source for cell in notebook.cells if cell.cell_type == "code"),
    }
    return notebook


def digest(code: Iterable[str]) -> str:
    """What tells outputs of this code from those of other code: jupytext keeps outputs of cells that have changed."""
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
