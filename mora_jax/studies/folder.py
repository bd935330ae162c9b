"""The folder of a study: what was asked for, the data, a run directory a cell, and what came of them."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mora_jax.display.figures import write_figure
from mora_jax.errors import InputError
from mora_jax.paths import is_local
from mora_jax.sweeps.folder import SweepFolder
from mora_jax.sweeps.grid import SweepRun
from mora_jax.sweeps.results import SweepResult
from mora_jax.training.config.load import config_from_dict

FILE = "study.json"
_CONTENTS = (FILE, "data", "runs", "items", "figures", "cells.csv", "claims.json", "conclusion.md")


class StudyFolder(SweepFolder):
    """A study's files. Cells are added to it as they become known, and a cell is never another one's.

    Args:
        out: the folder.

    Raises:
        InputError: the path can't be used.
    """

    file: ClassVar[str] = FILE
    keys: ClassVar[tuple[str, ...]] = ("asked", "runs", "failed")
    what: ClassVar[str] = "study"

    def __init__(self, out: str) -> None:
        if not is_local(out):
            raise InputError(f"{out}: a study is written to a local folder")
        super().__init__(out)
        self.data, self.items, self.figures = (Path(self.path) / name for name in ("data", "items", "figures"))
        # An earlier study is moved from `aside` to `moving` and back, so that a killed process leaves one of them.
        self._aside, self._moving = (Path(self.path) / name for name in (".replaced", ".replaced.moving"))

    @contextlib.contextmanager
    def opened(self, asked: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Begins the study, or goes on with it where this very one began here; keeps others out meanwhile.

        Args:
            asked: what was asked for, as JSON gives it back.
            resume: there has to be one already.
            overwrite: replace what is there, once the first cell has begun.

        Whatever ends it before that, the folder is left as it was.

        Raises:
            InputError: the folder holds something else, or nothing to resume.
        """
        folder = Path(self.path)
        if not folder.is_dir():
            self._directory.check_free(overwrite)
        with contextlib.ExitStack() as context:
            if not folder.exists():
                context.callback(_remove_if_empty, folder)
            context.enter_context(self._directory.claimed())
            self._take_back()  # where the process that was to replace it was killed
            present = self.files.present(_CONTENTS)
            if goes_on := bool(present) and not overwrite:
                self._check_same(asked, self._read()["asked"] if FILE in present else None)
            elif resume:
                raise InputError(f"{folder} holds no study to resume: {folder / FILE} is missing")
            else:
                self._directory.check_free(overwrite)
                self._put_aside(present)
            try:
                if not goes_on:
                    self._write({"asked": dict(asked), "runs": [], "failed": {}})
                self.data.mkdir(parents=True, exist_ok=True)
                yield
            except BaseException:  # errors, signals, a full disk
                self._take_back()
                raise
            self.files.remove(self._aside.name)

    def _check_same(self, asked: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
        """Refuses to go on with another study."""
        if before == asked:
            return
        differs = f"{FILE} is missing"
        if before is not None:
            name = next(name for name in {**asked, **before} if before.get(name) != asked.get(name))
            differs = f"its {name} is {before.get(name)}, here it is {asked.get(name)}"
        raise InputError(
            f"{self.path} holds another study ({differs}); replace it with --overwrite, or set another --out"
        )

    def _put_aside(self, names: Sequence[str]) -> None:
        """Moves an earlier study aside, until the first cell of a new one has begun in its place."""
        self._moving.mkdir()
        for name in names:
            (Path(self.path) / name).rename(self._moving / name)
        self._moving.rename(self._aside)

    def _take_back(self) -> None:
        """Puts an earlier study back where no cell of the new one has begun, and removes it where one has.

        The process may be killed between any two of these lines, and the next one goes on from there.
        """
        if self._aside.exists() and self.files.present(("runs",)):
            self.files.remove(self._aside.name)
        elif self._aside.exists():
            for name in _CONTENTS:
                self.files.remove(name)
            self._aside.rename(self._moving)
        if self._moving.exists():
            for path in self._moving.iterdir():
                path.rename(Path(self.path) / path.name)
            self._moving.rmdir()

    def check_free(self, runs: Sequence[SweepRun], overwrite: bool) -> bool:
        """Adds the cells that are new; those that are there have to be the same.

        Raises:
            InputError: a cell's configuration changed since.
        """
        values = self._read()
        known = {run["name"]: run for run in values["runs"]}
        for run in self._described(runs):
            if _computed(known.setdefault(run["name"], run)) != _computed(run):
                raise InputError(
                    f"{self.path} holds another cell of the name {run['name']}, of an earlier version of the study; "
                    "set another --out"
                )
        self._write(values | {"runs": list(known.values())})
        return True

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Nothing: the study has done it."""
        yield

    def write(self, result: SweepResult) -> str | None:
        """Nothing: the study writes what came of all cells."""

    def forget_failures(self) -> None:
        """Cells that failed are tried again."""
        values = self._read()
        for name in values["failed"]:
            self.files.remove(f"runs/{name}")
        self._write(values | {"failed": {}})

    def write_figure(self, name: str, figure: Any) -> None:
        """Writes a figure as PNG and as SVG."""
        self.figures.mkdir(exist_ok=True)
        for ending in (".png", ".svg"):
            write_figure(figure, self.figures / (name + ending), dpi=200)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _computed(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a described cell computes, wherever its folder lies and by whatever path that is named."""
    # With the defaults of keys that came after it was written down.
    config = config_from_dict(run["config"]).to_dict()
    data = config["data"]
    files = {name: [Path(path).name for path in data[name] or ()] for name in ("train", "eval")}
    model = config["model"] | {"path": None}  # which is asked for, once for all
    return {**config, "out": None, "log": None, "model": model, "data": data | files}
