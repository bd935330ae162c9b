"""Metrics to Weights & Biases, offline unless asked otherwise, through its own package."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from mora_jax.errors import InputError
from mora_jax.training.config import Config
from mora_jax.training.observe.writers import tagged

ID_FILE = "wandb.json"


def check_login() -> None:
    """Refuses to go online where nobody is logged in.

    Raises:
        InputError: names the ways to mend it.
    """
    try:
        known = wandb.login(prompt=False)
    except wandb.Error as error:
        raise _refusal(error) from None
    if not known:
        raise _refusal("nobody is logged in")


def _refusal(why: object) -> InputError:
    return InputError(
        f"log.wandb: Weights & Biases can't be used online ({why}): run wandb login, set WANDB_API_KEY, "
        f"or set log.wandb_mode=offline"
    )


class WandbWriter:
    """One run of Weights & Biases, the same one after a resume: its id is kept in `wandb.json`.

    Offline, every process that goes on with a run writes the whole of it anew, from `metrics.jsonl`, and removes what
    its forerunner had written: one folder is there to be synchronised, and no step is in it twice. Online, the server
    ignores steps that it knows already.

    Args:
        directory: of the run; files lie in its folder `wandb`.
        config: of the run.
        rows: of `metrics.jsonl` up to the step at which this process starts.

    Raises:
        InputError: the server can't be reached or refuses.
    """

    name = "Weights & Biases"

    def __init__(self, directory: Path, config: Config, rows: Iterable[Mapping[str, Any]]):
        mode: Literal["offline", "online"] = "offline" if config.log.wandb_mode == "offline" else "online"
        run_id = _run_id(directory / ID_FILE)
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                id=run_id,
                name=directory.absolute().name,
                dir=str(directory),
                mode=mode,
                resume="allow",
                config=config.to_dict(),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise _refusal(" ".join(str(error).split())) from None
        if mode == "online":
            self.how_to_open = str(self._run.url)
            return
        folder = Path(self._run.dir).parent
        self.how_to_open = f"wandb sync {folder}"
        for row in rows:
            self.write(row)
        for earlier in folder.parent.glob(f"offline-run-*-{run_id}"):
            if earlier.name != folder.name:
                shutil.rmtree(earlier)

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row of `metrics.jsonl`."""
        self._run.log(tagged(row), step=row["step"])

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Ends the log; a run without a summary counts as crashed there, until it is resumed."""
        if summary is not None:
            self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary is not None else 1)


def _run_id(file: Path) -> str:
    """The id that the run has had from its start."""
    if file.is_file():
        return str(json.loads(file.read_text(encoding="utf-8"))["id"])
    run_id = uuid.uuid4().hex[:8]
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_text(json.dumps({"id": run_id}) + "\n", encoding="utf-8")
    beside.replace(file)
    return run_id
