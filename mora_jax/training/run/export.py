"""What a run is for: the adapter, or the model where its base is not that of old."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mora_jax.adapters.merge import merge
from mora_jax.interop import save_adapter, save_pretrained
from mora_jax.models.decoder import Decoder
from mora_jax.paths import found_path
from mora_jax.training.config.schema import RESULT_IS_MODEL, Config


def result_name(config: Config) -> str:
    """The name of its folder in the run's."""
    return "model" if config.adapter.method in RESULT_IS_MODEL else "adapter"


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
    if config.adapter.method not in RESULT_IS_MODEL:
        base = found_path(config.model.path or "")
        save_adapter(model, out, base_model_name_or_path=base, overwrite=True, write=write)
        return
    if restarted:
        merge(model)
    save_pretrained(model, out, tokenizer, overwrite=True, write=write)
