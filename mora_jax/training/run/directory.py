"""The folder of one run: configuration, metrics, summary, checkpoints and the result."""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mora_jax.data.templates.builtin import TEMPLATES
from mora_jax.errors import InputError
from mora_jax.paths import OFF, found_path, is_local, local_path
from mora_jax.training.config.load import config_from_dict
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.run.storage import Files, MemoryFiles, open_files

#: Lines of `metrics.jsonl` that could not be read.
DAMAGED = "metrics.damaged.txt"
CONTENTS = (
    "config.json",
    "metrics.jsonl",
    DAMAGED,
    "compile.jsonl",
    "summary.json",
    "adapter",
    "model",
    "best",
    "checkpoints",
    "profile",
    "tensorboard",
    "wandb",
    "wandb.json",
)


# Orbax and etils take these for patterns, or can't read them back.
_ODD = re.compile(r"[*?\[\\\x00-\x1f]")


class RunDirectory:
    """A run's files; each is written beside and renamed, but for the metrics, which grow line by line.

    Args:
        path: the folder, local or in a bucket; None for a run that writes nothing, whose record is in memory.
        writes: whether this process writes; of several only one does.
        note: is told, in a line each, of what went wrong and was tried again.

    Raises:
        InputError: the path can't be used.

    Attributes:
        path: the folder; a `pathlib.Path`, or in a bucket an `epath.Path`.
        files: reads and writes what is in it.
        kept: whether there are files at all.
        checkpoints: the folder of checkpoints.
        best: the folder of what the best checkpoint gives.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        writes: bool = True,
        note: Callable[[str], None] = lambda text: None,
    ):
        self.files: Files = MemoryFiles() if path is None else open_files(path)
        self.files.note = note
        self.path, self.kept, self.writes = self.files.path, path is not None, writes
        self.checkpoints, self.best = self.path / "checkpoints", self.path / "best"
        if odd := _ODD.search(os.fspath(self.path)):
            raise InputError(f"{self.path}: no run can be kept where a path has {odd[0]!r} in it; choose another")

    def check_free(self, overwrite: bool) -> None:
        """Refuses a path that can't become a run's folder, before anything is computed.

        Raises:
            InputError: it holds a run (names --resume), or is a file, or nothing can be written there.
        """
        if not self.files.remote and self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; set config.out to a folder")
        if not self.files.remote and self.writes:
            there = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
            if not os.access(there, os.W_OK | os.X_OK):
                raise InputError(f"{self.path} can't be made: {there} takes no files; set another config.out")
        taken = self.files.present(CONTENTS)
        if taken and not overwrite:
            raise InputError(
                f"{self.path} holds a run already ({', '.join(taken)}); continue it with --resume {self.path}, "
                f"replace it with --overwrite, or set another config.out"
            )

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the folder and keeps other runs out of it.

        Raises:
            InputError: another run is writing to it.
        """
        if not self.writes:
            yield
            return
        self.files.make()
        with self.files.claimed():
            yield

    def create(self, config: Config, overwrite: bool) -> None:
        """Removes an earlier run if that was asked for, and writes `config.json`.

        Raises:
            InputError: a run began here since `check_free`.
        """
        if not self.writes:
            return
        self.check_free(overwrite)
        if overwrite:
            for name in CONTENTS:
                self.files.remove(name)
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        """Writes `config.json`, with paths that hold from any working directory."""
        self.write_json("config.json", with_absolute_paths(config).to_dict())

    def read_config(self) -> Config:
        """The configuration of the run.

        Raises:
            InputError: there is no run here, or its configuration can't be read.
        """
        file = self.path / "config.json"
        values = self.read_json("config.json")
        if values is None:
            raise InputError(f"{self.path} holds no run: {file} is missing")
        return config_from_dict(values, origin=str(file))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What a JSON file of the run holds; None where there is no such file.

        Raises:
            InputError: it can't be read, or holds no object.
        """
        text = self.files.read(name)
        if text is None:
            return None
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InputError(f"{self.path / name} is damaged: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{self.path / name} must hold a JSON object")
        return values

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes one JSON file, whole or not at all."""
        if self.writes:
            self.files.write(name, json.dumps(values, indent=2) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows written so far; of lines that can't be read the run's files are told.

        A last line that a killed run left unfinished is dropped without a word.
        """
        rows, damaged = self._metrics()
        if damaged:
            self.files.note(f"{self.path / 'metrics.jsonl'}: left out {_lines(damaged)}, which can't be read")
        return rows

    def _metrics(self) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
        """The rows, and by its number, from 1, each line that is none."""
        *lines, last = (self.files.read("metrics.jsonl") or b"").split(b"\n")
        rows: list[dict[str, Any]] = []
        damaged: dict[int, bytes] = {}
        for number, line in enumerate([*lines, last], 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
            elif line.strip() and number <= len(lines):
                damaged[number] = line
        return rows, damaged

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Forgets rows of steps after `step`, which a resumed run computes again; returns the others.

        Lines that can't be read are kept in a file of their own.
        """
        rows, damaged = self._metrics()
        rows = [row for row in rows if row["step"] <= step]
        if self.writes:
            if damaged:
                text = "".join(line.decode("utf-8", "backslashreplace") + "\n" for line in damaged.values())
                self.files.append(DAMAGED, text)
                self.files.flush()
                what = f"{_lines(damaged)} of metrics.jsonl can't be read"
                self.files.note(f"{what}: kept in {self.path / DAMAGED}, the other rows stay")
            self.files.write("metrics.jsonl", "".join(_line(row) for row in rows))
        return rows

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows to `metrics.jsonl`."""
        if self.writes:
            self.files.append("metrics.jsonl", "".join(_line(row) for row in rows))

    def append_compilations(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows to `compile.jsonl`, which keeps those of every process that resumed the run."""
        if self.writes:
            self.files.append("compile.jsonl", "".join(_line(row) for row in rows))

    def append_hang(self, report: str) -> None:
        """Adds a report of a hung step to `hangs.txt`."""
        if self.writes or not self.files.remote:  # in a bucket processes would overwrite each other's
            self.files.append("hangs.txt", f"{report}\n\n")
            self.files.flush()


def with_absolute_paths(config: Config) -> Config:
    """The configuration with what it names on this machine's disk by absolute paths; not hub ids and buckets."""
    data = config.data
    paths: dict[str, Any] = {
        "model.path": config.model.path and found_path(config.model.path),
        "adapter.path": config.adapter.path and found_path(config.adapter.path),
        "data.train": data.train and tuple(map(found_path, data.train)),
        "data.eval": data.eval and tuple(map(found_path, data.eval)),
        "train.eval_tasks": config.train.eval_tasks and tuple(map(_absolute_task, config.train.eval_tasks)),
    }
    if config.out and is_local(config.out):
        paths["out"] = str(local_path(config.out))
    for name, folder in (("data.cache", data.cache), ("log.compilation_cache", config.log.compilation_cache)):
        if folder not in (None, OFF) and is_local(folder):
            paths[name] = str(local_path(folder))
    if data.template is not None and data.template not in ("tokenizer", *TEMPLATES):
        paths["data.template"] = found_path(data.template)
    return lay_over(config, [(name, value, "config.json") for name, value in paths.items() if value is not None])


def _absolute_task(text: str) -> str:
    """NAME=FILE with its paths absolute."""
    name, equals, file = text.partition("=")
    return f"{found_path(name) if name.endswith('.toml') else name}{equals}{found_path(file)}"


def _lines(numbers: Iterable[int]) -> str:
    """`line 3`, `lines 3, 7`."""
    listed = ", ".join(map(str, numbers))
    return f"lines {listed}" if "," in listed else f"line {listed}"


def _line(row: Mapping[str, Any]) -> str:
    # JSON has no number that is not finite.
    values = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
    return json.dumps(values) + "\n"
