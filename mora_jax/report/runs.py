"""Runs as a report reads them, from their directories."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_jax.errors import InputError
from mora_jax.paths import local_path
from mora_jax.training.config.schema import Config, flatten
from mora_jax.training.display import bytes_words, duration
from mora_jax.training.run.directory import RunDirectory


@dataclass(frozen=True)
class Run:
    """A run that was trained, is training, or was stopped.

    Attributes:
        name: the end of its path that sets it apart from the other runs.
        directory: its folder.
        config: its configuration.
        summary: what `summary.json` holds of what is compared, numbers where they have to be; empty before its end.
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
        """How far it is, such as "done"."""
        if self.summary:
            return "done"
        last = max((row["step"] for row in [*self.steps, *self.evaluations]), default=0)
        return f"not ended: step {last}" if last else "not ended: no step yet"

    def results(self) -> dict[str, Any]:
        """What is compared between runs, as far as it is known; the last values of one that has not ended."""
        last = self.steps[-1] if self.steps else {}
        scored = self.evaluations[-1] if self.evaluations else {}
        # Whatever an evaluation measures besides the loss (tasks, say) stands in its rows alone.
        scores = {name: value for name, value in scored.items() if not any(word in name for word in _COUNTS)}
        known = last | scores | {"steps": last.get("step"), "final_loss": last.get("loss")} | self.summary
        known["method"] = str(self.summary.get("method", self.config.adapter.method))
        return {name: known.get(name) for name in dict.fromkeys((*COMPARED, *scores))}


#: What is compared of a summary, or of the last rows of a run without one, by key: its head in a table, and its values
#: as text. All but the method are numbers.
COMPARED: dict[str, tuple[str, Callable[[Any], str]]] = {
    "method": ("method", str),
    "trainable_parameters": ("trained", "{:,}".format),
    "steps": ("steps", "{:,}".format),
    "final_loss": ("final loss", "{:.4f}".format),
    "eval_loss": ("eval loss", "{:.4f}".format),
    "eval_perplexity": ("perplexity", "{:,.2f}".format),
    "best_step": ("best step", "{:,}".format),
    "resumed_after": ("resumed after", "{:,}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "wall_seconds": ("time", duration),
    "peak_memory_bytes": ("memory", bytes_words),
}
# Parts of names of what an evaluation counts and doesn't measure.
_COUNTS = ("step", "tokens", "seconds", "examples")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(
    paths: Iterable[str | os.PathLike[str]], note: Callable[[str], None] = lambda text: None, taken: str = ""
) -> list[Run]:
    """Reads runs, each once.

    Args:
        paths: run directories, and folders of a sweep, which stand for all of its runs.
        note: is told of lines that can't be read.
        taken: a name that no run gets, nor one that begins with it and a space.

    Raises:
        InputError: one of them is no run.
    """
    folders = dict.fromkeys(folder for path in paths for folder in _folders(path))
    names = _names([Path(folder).parts for folder in folders], taken)
    return [_read(name, folder, note) for name, folder in zip(names, folders, strict=True)]


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


def _names(parts: Sequence[tuple[str, ...]], taken: str) -> list[str]:
    """The shortest ends of paths that all differ, also from `taken`."""
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names) and not any(name == taken or name.startswith(f"{taken} ") for name in names):
            return names
    return ["/".join(part) for part in parts]


def _read(name: str, folder: str, note: Callable[[str], None]) -> Run:
    directory = RunDirectory(folder, writes=False)
    directory.files.note = note
    config = directory.read_config()
    summary = directory.read_json("summary.json") or {}
    # A number that was written as something else can't be compared.
    numbers = COMPARED.keys() - {"method"}
    summary = {key: value for key, value in summary.items() if key not in numbers or _is_number(value)}
    rows = [{key: value for key, value in row.items() if _is_number(value)} for row in directory.read_metrics()]
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if any(key.startswith("eval_") for key in row)]
    return Run(name, directory, config, summary, steps, evaluations)


# What of the section `data` doesn't change which tokens are evaluated; and what does so only without `data.eval`.
_OF_TRAINING = ("packing", "bucketing", "workers", "cache", "streaming")
_HELD_OUT = ("train", "split", "eval_fraction")


def evaluated_alike(runs: Sequence[Run]) -> bool:
    """Whether the evaluation losses of runs are of the same tokens and one objective, and compare.

    Those of runs that ended are known by their hash. Others are judged by their configurations.
    """
    hashes = [run.summary.get("eval_data") for run in runs]
    if all(hashes):
        return len(set(hashes)) == 1
    settings = []
    for run in runs:
        data = run.config.to_dict()["data"]
        left_out = _OF_TRAINING if data["eval"] is None else (*_OF_TRAINING, *_HELD_OUT)
        seed = run.config.seed if data["eval"] is None else None
        of_data = {key: data[key] for key in data if key not in left_out}
        settings.append((of_data, seed, run.config.model.path, run.config.loss.scored))
    return all(other == settings[0] for other in settings)


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The keys of the configuration whose values differ among the runs, each with a value a run; without `out`."""
    settings = [dict(flatten(run.config.to_dict())) for run in runs]
    keys = [key for key in (settings[0] if settings else {}) if key != "out"]
    values = {key: [one.get(key) for one in settings] for key in keys}
    return {key: column for key, column in values.items() if any(value != column[0] for value in column)}
