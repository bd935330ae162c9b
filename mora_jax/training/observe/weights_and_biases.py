"""Metrics to Weights & Biases, offline unless asked otherwise, through its own package."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from mora_jax.errors import InputError
from mora_jax.training.config.schema import Config
from mora_jax.training.observe.tags import tagged
from mora_jax.training.run.directory import RunDirectory
from mora_jax.training.run.storage import Files

ID_FILE = "wandb.json"
FOLDER = "wandb"


def check_login() -> None:
    """Refuses to go online where nobody is logged in.

    Raises:
        InputError: names how to fix it.
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

    Offline, every process that resumes a run writes the whole of it again, from `metrics.jsonl`, and removes what
    its forerunner had written: one folder is there to be synchronised, and no step is in it twice. Online, the server
    ignores steps that it knows already.

    Args:
        directory: of the run, whose `metrics.jsonl` has the rows up to the step at which this process starts; files
            lie in its folder `wandb`.
        config: of the run.

    Raises:
        InputError: the server can't be reached or refuses.
    """

    name = "Weights & Biases"

    def __init__(self, directory: RunDirectory, config: Config):
        mode: Literal["offline", "online"] = "offline" if config.log.wandb_mode == "offline" else "online"
        files = directory.files
        run_id = _run_id(files)
        folder = files.on_disk(FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                id=run_id,
                name=_name(directory),
                dir=str(folder.parent),
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
        own = Path(self._run.dir).parent.name
        where = directory.path / FOLDER / own
        # Its program reads disks alone.
        fetched = f"gcloud storage cp -r {where} . && wandb sync {own}"
        self.how_to_open = fetched if files.remote else f"wandb sync {where}"
        for row in directory.read_metrics():
            self.write(row)
        for earlier in files.names(FOLDER):
            if earlier != own and earlier.startswith("offline-run-") and earlier.endswith(f"-{run_id}"):
                files.remove(f"{FOLDER}/{earlier}")

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row of `metrics.jsonl`."""
        self._run.log(tagged(row), step=row["step"])

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Ends the log; a run without a summary counts as crashed there, until it is resumed."""
        if summary is not None:
            self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary is not None else 1)


def _run_id(files: Files) -> str:
    """The id that the run has had from its start."""
    text = files.read(ID_FILE)
    if text is not None:
        return str(json.loads(text)["id"])
    run_id = uuid.uuid4().hex[:8]
    files.write(ID_FILE, json.dumps({"id": run_id}) + "\n")
    return run_id


def _name(directory: RunDirectory) -> str:
    """The last part of the run directory's path, wherever that is relative to."""
    path = directory.path
    return str((path if directory.files.remote else path.absolute()).name)
