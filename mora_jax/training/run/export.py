"""What a run is for: the adapter, or the model where its base is not that of old."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mora_jax.adapters.merge import merge
from mora_jax.errors import InputError
from mora_jax.interop import save_adapter, save_pretrained
from mora_jax.models.decoder import Decoder
from mora_jax.paths import found_path
from mora_jax.training.config.schema import Config
from mora_jax.training.run.retry import persistently
from mora_jax.training.run.storage import Files


def result_name(config: Config) -> str:
    """The name of its folder in the run's."""
    return "model" if config.adapter.config_class.changes_base else "adapter"


def write_result(
    model: Decoder, out: Path, config: Config, tokenizer: Any, *, restarted: bool, write: bool = True
) -> None:
    """Writes it, in place of what a run that was killed at its end may have left there.

    Args:
        model: as trained; merged in place where the method has restarts.
        out: the folder.
        config: of the run.
        tokenizer: goes with a model.
        restarted: whether the method folds its adapters into the base.
        write: False on processes that only take part in gathering.
    """
    if not config.adapter.config_class.changes_base:
        base = found_path(config.model.path or "")
        save_adapter(model, out, base_model_name_or_path=base, overwrite=True, write=write)
        return
    if restarted:
        merge(model)
    save_pretrained(model, out, tokenizer, overwrite=True, write=write)


def write_persistently(write: Callable[[Path], None], out: Path, files: Files, *, rescue: bool) -> None:
    """Writes a folder of a run, and again after a while where the disk doesn't take it.

    Args:
        write: given the path, writes the whole folder, and says by an `InputError` what the disk said.
        out: the folder.
        files: of the run.
        rescue: write it at last to a temporary folder, since nothing else holds what would be in it.

    Raises:
        InputError: it could not be written to `out`.
    """

    def attempt() -> None:
        try:
            write(out)
        except InputError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    try:
        persistently(attempt, f"{out} can't be written", files.hint, files.note)
    except InputError as error:
        what = str(error).removesuffix(files.hint)
        if not rescue or what == str(error):
            raise
        raise InputError(f"{what}{_rescued(write, out.name)}") from None


def _rescued(write: Callable[[Path], None], name: str) -> str:
    """Writes a folder to where temporary files are; says what became of it."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="mora-jax-"))
        try:
            write(folder / name)
        except BaseException:
            folder.rmdir()
            raise
    except (OSError, InputError):
        lost = f"nor in {tempfile.gettempdir()}, so what was trained is lost"
        return f"{lost}: make room, and let train.save_every write checkpoints"
    return f"what was trained is in {folder / name}: make room, and move it there"
