"""What of a run may be changed when it is resumed: where it runs and what it writes, not what it computes."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from mora_jax.errors import InputError
from mora_jax.training.config.checks import check_together
from mora_jax.training.config.schema import Config, find_key, lay_over

#: Keys, and sections whose keys all may. Base and data are compared by content with what the run began with.
CHANGEABLE = (
    "mesh",
    "log",
    "model.path",
    "model.attention",
    "model.remat",
    "model.unroll",
    "data.train",
    "data.eval",
    "data.workers",
    "data.cache",
    "train.eval_tasks",
    "train.micro_batch_size",
    "train.save_every",
    "train.keep",
    "train.watchdog_seconds",
    "optimizer.offload",
)


def changed(config: Config, overrides: Sequence[tuple[str, str]]) -> Config:
    """A run's configuration with what is different from now on.

    Args:
        config: as the run has it.
        overrides: (dotted key, text) pairs from the command line; later ones win.

    Raises:
        InputError: an unknown key or a wrong value; or one that would make another run of it, and names the others.
    """
    settings = []
    for name, text in overrides:
        origin = f"--config.{name}"
        value = find_key(name, origin).parse(text, origin)
        if name not in CHANGEABLE and name.split(".")[0] not in CHANGEABLE:
            known = ", ".join(f"{key}.*" if "." not in key else key for key in CHANGEABLE)
            raise InputError(f"{origin} would make another run of it: with --resume only {known} can be changed")
        settings.append((name, value, origin))
    found = lay_over(config, settings)
    check_together(found)
    return found


def check_found(config: Config, run: str | os.PathLike[str]) -> None:
    """Refuses a run whose model or data have gone from where its `config.json` says that they are.

    Raises:
        InputError: names the path, and the key that says where it is now.
    """
    data = config.data
    named = [("model.path", config.model.path), ("adapter.path", config.adapter.path)]
    named += [("data.train", path) for path in data.train or ()] + [("data.eval", path) for path in data.eval or ()]
    named += [("train.eval_tasks", text.partition("=")[2]) for text in config.train.eval_tasks or ()]
    for name, path in named:
        if path is None or not Path(path).is_absolute() or Path(path).exists() or glob.glob(path, recursive=True):
            continue
        how = f"say where it is now with --config.{name}=..." if name in CHANGEABLE else "put it back there"
        raise InputError(f"{path}, which the run in {run} names as {name}, is not there any more; {how}")
