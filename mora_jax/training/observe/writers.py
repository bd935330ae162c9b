"""Where metrics go besides `metrics.jsonl`: what all writers share, and which ones a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from mora_jax.errors import InputError

if TYPE_CHECKING:
    from mora_jax.training.config.schema import Config
    from mora_jax.training.run.directory import RunDirectory


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
