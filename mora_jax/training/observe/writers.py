"""Where metrics go besides `metrics.jsonl`: what all writers share, and which ones a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from mora_jax.errors import InputError

if TYPE_CHECKING:
    from mora_jax.training.config import Config
    from mora_jax.training.run_directory import RunDirectory

_SPEED = frozenset(
    {"tokens_per_second", "mfu", "step_seconds", "data_wait_seconds", "host_seconds", "device_seconds"}
)  # fmt: skip


class Writer(Protocol):
    """A place for metrics.

    Attributes:
        name: of the program that shows them.
        how_to_open: the command that does.
    """

    name: str
    how_to_open: str

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row of `metrics.jsonl`."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Ends the log: with the run's summary where it came to its end."""


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers under the names that plots are grouped by: `train/loss`, `eval/loss`, `speed/mfu`, ..."""
    found = {}
    for name, value in row.items():
        if name == "step" or value is None:
            continue
        if name.startswith("eval_"):
            tag = f"eval/{name.removeprefix('eval_')}"
        elif name in _SPEED:
            tag = f"speed/{name}"
        else:
            tag = f"memory/{name}" if name.endswith("_bytes") else f"train/{name}"
        found[tag] = float(value)
    return found


def check_writers(config: Config) -> None:
    """Refuses writers that can't work here, before anything is loaded or written.

    Raises:
        InputError: a package is missing (names the command that installs it), or nobody is logged in.
    """
    wanted = {"tensorboard": ("tensorboardX", config.log.tensorboard), "wandb": ("wandb", config.log.wandb)}
    for extra, (package, on) in wanted.items():
        if on and find_spec(package) is None:
            raise InputError(f"log.{extra} needs the package {package}: pip install 'mora-jax[{extra}]'")
    if config.log.wandb and config.log.wandb_mode == "online":
        from mora_jax.training.observe.weights_and_biases import check_login

        check_login()


def open_writers(config: Config, directory: RunDirectory, first_step: int) -> list[Writer]:
    """The writers that a run asks for, ready to go on after `first_step` steps."""
    writers: list[Writer] = []
    if config.log.tensorboard:
        from mora_jax.training.observe.tensorboard import TensorBoardWriter

        writers.append(TensorBoardWriter(directory, config, first_step))
    if config.log.wandb:
        from mora_jax.training.observe.weights_and_biases import WandbWriter

        writers.append(WandbWriter(directory, config))
    return writers
