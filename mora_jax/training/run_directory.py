"""The folder of one run: configuration, metrics, summary, checkpoints and the result."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mora_jax.errors import InputError
from mora_jax.training.config import Config

CONTENTS = (
    "config.json",
    "metrics.jsonl",
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


class RunDirectory:
    """A run's files; each is written beside and renamed, but for the metrics, which grow line by line.

    Args:
        path: the folder.
        writes: whether this process writes; of several only one does.
    """

    def __init__(self, path: str | os.PathLike[str], *, writes: bool = True):
        self.path = Path(path).expanduser()
        self.writes = writes

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def check_free(self, overwrite: bool) -> None:
        """Refuses a path that can't become a run's folder, before anything is computed.

        Raises:
            InputError: it holds a run (names --resume), or is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; set config.out to a folder")
        taken = [name for name in CONTENTS if (self.path / name).exists()]
        if taken and not overwrite:
            raise InputError(
                f"{self.path} holds a run already ({', '.join(taken)}); continue it with --resume {self.path}, "
                f"replace it with --overwrite, or set another config.out"
            )

    def create(self, config: Config, overwrite: bool) -> None:
        """Makes the folder, removes an earlier run if that was asked for, and writes `config.json`."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in CONTENTS:
                target = self.path / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
        self.write_json("config.json", config.to_dict())

    def read_config(self) -> Config:
        """The configuration of the run.

        Raises:
            InputError: there is no run here, or its configuration can't be read.
        """
        file = self.path / "config.json"
        if not file.is_file():
            raise InputError(f"{self.path} holds no run: {file} is missing")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is damaged: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{file} must hold a JSON object")
        return Config.from_dict(values, origin=str(file))

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes one JSON file, whole or not at all."""
        if not self.writes:
            return
        beside = self.path / f".{name}.tmp"
        beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        beside.replace(self.path / name)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows written so far; a last line that a killed run left unfinished is dropped."""
        if not self.metrics.is_file():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Forgets rows of steps after `step`, which a resumed run computes again; returns the others."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        if not self.writes:
            return rows
        beside = self.path / ".metrics.jsonl.tmp"
        beside.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        beside.replace(self.metrics)
        return rows

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows to `metrics.jsonl`."""
        if not self.writes:
            return
        with self.metrics.open("a", encoding="utf-8") as file:
            file.writelines(_line(row) for row in rows)

    def append_compilations(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows to `compile.jsonl`, which keeps those of every process that worked on the run."""
        with (self.path / "compile.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(_line(row) for row in rows)


def _line(row: Mapping[str, Any]) -> str:
    # JSON has no number that is not finite.
    values = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
    return json.dumps(values) + "\n"
