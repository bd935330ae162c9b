"""Runs the notebooks and stores them with what came out, for people who read them without running them.

    pip install -e '.[notebook]'
    python scripts/run_notebooks.py [notebooks/NAME.ipynb …]

Each notebook is a pair: NAME.py, the text (jupytext's percent format), and NAME.ipynb, with outputs. Edit either of
them; here the newer one brings the other into step, then the notebook is run from its first cell to its last in an
empty folder, and stored. The cell that installs the package and the badge are the same in all: they are written here,
with the address of the repository that pyproject.toml has.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
# An address that pip and the reader's browser take; one place has it.
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
INSTALL = f"""\
# Installs mora-jax where it is missing, from a wheel or a clone beside this notebook or else from PACKAGE, and keeps
# the jax of the runtime: another one would not fit the plugin of its accelerator.
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("mora_jax") is None:
    PACKAGE = "git+{REPOSITORY}"  # or a name on an index
    wheel = next(pathlib.Path().absolute().glob("mora_jax-*.whl"), None)
    clone = pathlib.Path("..").absolute() if pathlib.Path("../pyproject.toml").exists() else None
    package = f"mora-jax[plots] @ {{PACKAGE}}" if "://" in PACKAGE else f"{{PACKAGE}}[plots]"
    package = f"{{wheel or clone}}[plots]" if wheel or clone else package
    there = [name for name in ("jax", "jaxlib") if importlib.util.find_spec(name)]
    keep = [f"{{name}}=={{importlib.metadata.version(name)}}" for name in there]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package, *keep], check=True)
    if "flax" in sys.modules:
        print("flax was imported before: restart the session (Runtime, Restart session) and run all cells again")"""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
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
    parser.add_argument("--sync", action="store_true", help="run nothing: outputs of code that has not changed stay")
    args = parser.parse_args()
    for path in args.notebooks or sorted(FOLDER.glob("*.py")):
        path = path.with_suffix(".ipynb")
        text = path.with_suffix(".py")
        if text.exists():
            text.write_text(with_common_cells(text.read_text(encoding="utf-8"), path.stem), encoding="utf-8")
        jupytext.cli.jupytext(["--quiet", "--sync", str(text if text.exists() else path)])
        notebook = synced(nbformat.read(path, as_version=4)) if args.sync else run(path)
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
        programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        client.execute(env=os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(ipython), "PATH": programs})
    notebook.metadata |= METADATA | {"outputs_of": digest(code_of(notebook))}
    return synced(notebook)


def synced(notebook: Any) -> Any:
    """The notebook without notes of jupytext's and states of widgets; the first cell, which installs, counts as run."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.clear()
    next(cell for cell in notebook.cells if cell.cell_type == "code").execution_count = 1
    return notebook


def code_of(notebook: Any) -> list[str]:
    """The sources of its cells of code."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def badge(name: str) -> str:
    """What opens a notebook on Colab."""
    repository = REPOSITORY.removeprefix("https://github.com/")
    address = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"


def with_common_cells(text: str, name: str) -> str:
    """The text of a notebook with the badge below its title and with the cell that installs, its first one of code."""
    text = re.sub(r"(?m)^# \[!\[Open in Colab\].*\n#\n", "", text)
    text = re.sub("(?m)^(# # .*\n)#\n", lambda title: f"{title[1]}#\n# {badge(name)}\n#\n", text, count=1)
    return re.sub("(?ms)^# %%\n.*?(?=^# %%)", lambda _: f"# %%\n{INSTALL}\n\n", text, count=1)


def digest(code: Iterable[str]) -> str:
    """What tells outputs of this code from those of other code: jupytext keeps outputs of cells that have changed.

    The first cell doesn't count: it does nothing where the package is installed.
    """
    return hashlib.sha256("\n".join(list(code)[1:]).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
