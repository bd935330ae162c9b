"""The folder of a sweep: what was asked for, the folders of its runs, and what came of them."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from mora_jax.errors import InputError
from mora_jax.sweeps.grid import SweepRun
from mora_jax.sweeps.results import SweepResult
from mora_jax.training.config.load import config_from_dict
from mora_jax.training.run.directory import CONTENTS, RunDirectory, with_absolute_paths

FILE = "sweep.json"
_CONTENTS = (FILE, "sweep.csv", "sweep.png", "runs")


class SweepFolder:
    """A sweep's files.

    Attributes:
        file: describes it.
        keys: of what is in that file.
        what: it is, in messages.

    Args:
        out: the folder, local or in a bucket.

    Raises:
        InputError: the path can't be used.
    """

    file: ClassVar[str] = FILE
    keys: ClassVar[tuple[str, ...]] = ("runs", "failed")
    what: ClassVar[str] = "sweep"

    def __init__(self, out: str):
        self._directory = RunDirectory(out)
        self.path, self.files = self._directory.path, self._directory.files

    def check_free(self, runs: Sequence[SweepRun], overwrite: bool) -> bool:
        """Whether this very sweep began here already, so that it goes on.

        Raises:
            InputError: the folder can't be used, or holds a run or another sweep.
        """
        present = self.files.present(_CONTENTS)
        others = [name for name in CONTENTS if name in self.files.present(CONTENTS)]
        if others:
            raise InputError(f"{self.path} holds a run ({', '.join(others)}), not a sweep; set another config.out")
        if present and not overwrite:
            # By what is read back: the file may be older than a configuration key, which then has its default.
            if FILE in present and self.runs() == [
                replace(run, config=with_absolute_paths(run.config)) for run in runs
            ]:
                return True
            raise InputError(
                f"{self.path} holds another sweep ({', '.join(present)}); continue that one with --resume {self.path}, "
                "replace it with --overwrite, or set another config.out"
            )
        self._directory.check_free(overwrite)
        return False

    def claimed(self) -> contextlib.AbstractContextManager[None]:
        """Makes the folder and keeps other sweeps out of it."""
        return self._directory.claimed()

    def create(self, runs: Sequence[SweepRun], overwrite: bool) -> None:
        """Removes an earlier sweep if that was asked for, and writes `sweep.json`."""
        if overwrite:
            for name in _CONTENTS:
                self.files.remove(name)
        self._write({"runs": self._described(runs), "failed": {}})

    def runs(self) -> list[SweepRun]:
        """The runs of the sweep that began here.

        Raises:
            InputError: there is none, or its file can't be read.
        """
        runs = []
        for run in self._read()["runs"]:
            # JSON has lists for tuples.
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in run["values"].items()}
            runs.append(SweepRun(run["name"], values, config_from_dict(run["config"], str(self.path / FILE))))
        return runs

    def failed(self) -> dict[str, str]:
        """The runs that failed, with what was said."""
        return self._read()["failed"] if self.files.present((self.file,)) else {}

    def note_failure(self, name: str, message: str) -> None:
        """Remembers that a run failed, so that it isn't tried again."""
        values = self._read()
        self._write(values | {"failed": values["failed"] | {name: message}})

    def write(self, result: SweepResult) -> str | None:
        """Writes the table and the picture; returns why there is no picture."""
        self.files.write("sweep.csv", result.csv())
        if self.files.remote:
            return "a picture is only written to a local folder"
        try:
            result.plot(self.path / "sweep.png")
        except InputError as error:
            return str(error)
        return None

    def _read(self) -> dict[str, Any]:
        text, file = self.files.read(self.file), self.path / self.file
        if text is None:
            raise InputError(f"{self.path} holds no {self.what}: {file} is missing")
        try:
            values = json.loads(text)
            return {key: values[key] for key in self.keys}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged: {error}") from None

    def _write(self, values: dict[str, Any]) -> None:
        self.files.write(self.file, json.dumps(values, indent=2) + "\n")

    @staticmethod
    def _described(runs: Sequence[SweepRun]) -> list[dict[str, Any]]:
        """As JSON gives it back."""
        described = [
            {"name": run.name, "values": run.values, "config": with_absolute_paths(run.config).to_dict()}
            for run in runs
        ]
        return json.loads(json.dumps(described))
