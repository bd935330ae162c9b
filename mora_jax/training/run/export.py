"""What a run is for: the adapter, or the model where its base is not that of old."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mora_jax.adapters.attach import partition
from mora_jax.adapters.merge import merge
from mora_jax.errors import InputError
from mora_jax.interop import load_pretrained, save_adapter, save_pretrained
from mora_jax.models.decoder import Decoder
from mora_jax.paths import found_path
from mora_jax.training.config.schema import Config
from mora_jax.training.run.checkpoint import read_trained
from mora_jax.training.run.directory import RunDirectory
from mora_jax.training.run.retry import with_retries
from mora_jax.training.run.storage import Files
from mora_jax.training.setup import put_adapter
from mora_jax.training.state import Structure, flat_arrays


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


def export_checkpoint(run: str, step: int, out: Path) -> None:
    """Writes the adapter that one checkpoint of a run holds, as `write_result` writes the last one.

    Args:
        run: its directory; the run may still be going on.
        step: after which the checkpoint was written.
        out: the folder.

    Raises:
        InputError: there is no such checkpoint, or the run trains the model itself.
    """
    directory = RunDirectory(run, writes=False)
    config = directory.read_config()
    if config.adapter.config_class.changes_base:
        raise InputError(
            f"{run} trains the model itself ({config.adapter.method}), so its checkpoints hold no adapter: end it with "
            f"mora-jax train --resume {run}, and give --model {run}/model"
        )
    trained = read_trained(directory.checkpoints, step)
    # As in training: some methods start from the base's exact numbers.
    how = {name: getattr(config.model, name) for name in ("dtype", "quantize")}
    model, tokenizer = load_pretrained(config.model.path or "", unroll=1, **how)
    put_adapter(model, config, config.train.steps or step)
    graphdef, adapters, frozen = partition(model)
    shapes = {name: array.shape for name, array in flat_arrays(adapters).items()}
    if shapes != {name: array.shape for name, array in trained.items()}:
        raise InputError(f"{run}: the checkpoint of step {step} is not of the adapter that its config.json describes")
    model = Structure(graphdef, adapters, frozen).model(trained, flat_arrays(frozen))
    write_result(model, out, config, tokenizer, restarted=False)


def write_with_retries(write: Callable[[Path], None], out: Path, files: Files, *, rescue: bool) -> None:
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
        with_retries(attempt, f"{out} can't be written", files.hint, files.note)
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
