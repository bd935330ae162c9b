"""Runs as a report reads them, from their directories."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_jax.errors import InputError
from mora_jax.paths import local_path
from mora_jax.training.config.schema import Config, flatten
from mora_jax.training.run.directory import RunDirectory


@dataclass(frozen=True)
class Run:
    """A run that was trained, is training, or was stopped.

    Attributes:
        name: the end of its path that sets it apart from the other runs.
        directory: its folder.
        config: its configuration.
        summary: what `summary.json` holds; empty before its end.
        steps: the rows of its logged steps, with a finite loss.
        evaluations: the rows of its evaluations; of tasks alone they have no `eval_loss`.
    """

    name: str
    directory: RunDirectory
    config: Config
    summary: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def path(self) -> str:
        """Of its folder."""
        return str(self.directory.path)

    @property
    def state(self) -> str:
        """How far it is, in words."""
        if self.summary:
            return "done"
        last = max((row["step"] for row in [*self.steps, *self.evaluations]), default=0)
        return f"not ended: step {last}" if last else "not ended: no step yet"

    def results(self) -> dict[str, Any]:
        """What is compared between runs, as far as it is known; the last values of one that has not ended."""
        summary, found = self.summary, dict[str, Any]()
        last = self.steps[-1] if self.steps else {}
        scored = self.evaluations[-1] if self.evaluations else {}
        found["method"] = summary.get("method", self.config.adapter.method)
        found["trainable_parameters"] = summary.get("trainable_parameters")
        found["steps"] = summary.get("steps", last.get("step"))
        found["final_loss"] = summary.get("final_loss", last.get("loss"))
        # Whatever an evaluation measures besides the loss (tasks, say) stands in its rows alone.
        found |= {name: value for name, value in scored.items() if _is_score(name, value)}
        for name in ("eval_loss", "eval_perplexity"):
            found[name] = summary.get(name, scored.get(name))
        found["best_step"] = summary.get("best_step")
        found["tokens_per_second"] = summary.get("tokens_per_second", last.get("tokens_per_second"))
        found["wall_seconds"] = summary.get("wall_seconds")
        found["peak_memory_bytes"] = summary.get("peak_memory_bytes")
        return found


def _is_score(name: str, value: Any) -> bool:
    counted = ("step", "tokens", "seconds", "examples")
    return isinstance(value, int | float) and not any(word in name for word in counted)


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Reads runs, each once.

    Args:
        paths: run directories, and folders of a sweep, which stand for all of its runs.

    Raises:
        InputError: one of them is no run.
    """
    folders = dict.fromkeys(folder for path in paths for folder in _folders(path))
    names = _names([Path(folder).parts for folder in folders])
    return [_read(name, folder) for name, folder in zip(names, folders, strict=True)]


def _folders(given: str | os.PathLike[str]) -> list[str]:
    """The run directories that a path names."""
    if "://" in os.fspath(given):
        return [os.fspath(given)]
    path = local_path(given)
    if not path.is_dir():
        raise InputError(f"{path} is no run: there is no such folder")
    if (path / "config.json").is_file():
        return [str(path)]
    inner = sorted(file.parent for file in (path / "runs").glob("*/config.json"))
    if not inner:
        raise InputError(f"{path} is no run: there is no config.json in it, nor runs of a sweep in its folder runs/")
    return [str(folder) for folder in inner]


def _names(parts: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest ends of paths that all differ."""
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]


def _read(name: str, folder: str) -> Run:
    directory = RunDirectory(folder, writes=False)
    config = directory.read_config()
    text = directory.files.read("summary.json")
    try:
        summary = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise InputError(f"{folder}/summary.json is damaged: {error}") from None
    rows = directory.read_metrics()
    steps = [row for row in rows if row.get("loss") is not None]
    evaluations = [row for row in rows if "loss" not in row]
    return Run(name, directory, config, summary, steps, evaluations)


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The keys of the configuration whose values differ among the runs, each with a value a run; without `out`."""
    settings = [dict(flatten(run.config.to_dict())) for run in runs]
    keys = [key for key in (settings[0] if settings else {}) if key != "out"]
    values = {key: [one.get(key) for one in settings] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}
