"""Models as HuggingFace folders."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.host import host
from mora_jax.errors import InputError
from mora_jax.interop.added_biases import bias_fields, zero_biases
from mora_jax.interop.folders import new_folder
from mora_jax.interop.layout import tensor_plan
from mora_jax.interop.tokenizer import TOKENIZER_FILES
from mora_jax.models.config import DecoderConfig
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import family_of

_DTYPES = ("float32", "bfloat16", "float16")


def save_pretrained(
    model: Decoder,
    out: str | os.PathLike[str],
    tokenizer: Any | None = None,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    write: bool = True,
) -> None:
    """Writes a model as a folder that `transformers` loads: config, weights, tokenizer, generation settings.

    Args:
        model: a model without adapters (merge them first).
        out: the folder; must not exist, or be empty.
        tokenizer: a transformers tokenizer to save with it; None to copy the files of the folder that the
            model was loaded from.
        dtype: "float32", "bfloat16" or "float16" on disk; None for float32, which loses nothing.
        max_shard_bytes: weights beyond this are split into several files with an index.
        write: False on all processes but one of those that hold parts of the model: all have to call this.

    Raises:
        InputError: when the model has adapters, or biases that its family has no place for, when the dtype is another
            one or too narrow, or `out` is in use.
    """
    if next(iter(adapters_of(model)), None) is not None:
        raise InputError("the model has unmerged adapters: call merge(model) first, or save them with save_adapter")
    target = _dtype(dtype)
    if not write:
        for _ in _tensors(model, target):
            pass  # gathered for the process that writes
        return
    with new_folder(out) as folder:
        text = json.dumps(_config(model.config, target.name) | bias_fields(model), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        _write_weights(model, folder, target, max_shard_bytes)
        origin = None if model.folder is None else Path(model.folder)
        copied = ("generation_config.json", *(() if tokenizer is not None else TOKENIZER_FILES))
        for name in copied:
            if origin is not None and (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))


def _dtype(dtype: Any) -> np.dtype:
    if dtype is None:
        return np.dtype(np.float32)
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in _DTYPES:
        raise InputError(f"a model is saved in one of {', '.join(_DTYPES)}, not {dtype!r}")
    return found


def _config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The original `config.json` with the dtype of the new file, under the spelling that it used."""
    family = family_of(config)
    values = {"architectures": [family.ARCHITECTURE], "model_type": family.MODEL_TYPE} | config.hf_config
    spellings = [name for name in ("dtype", "torch_dtype") if name in values] or ["torch_dtype"]
    return values | dict.fromkeys(spellings, dtype)


def _tensors(model: Decoder, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as files have it, one parameter's at a time."""
    for entry in tensor_plan(model):
        parameter = host(entry.parameter[...])
        for piece in entry.pieces:
            tensor = piece.take(parameter)
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(tensor.astype(dtype))
            if dtype == np.float16 and not np.isfinite(stored).all():
                raise InputError(f"tensor {piece.name} has values that float16 cannot hold; save in another dtype")
            yield piece.name, stored
    for name, zeros in zero_biases(model):
        yield name, zeros.astype(dtype)


def _write_weights(model: Decoder, folder: Path, dtype: np.dtype, max_shard_bytes: int) -> None:
    """Writes the weights, in several files where they are larger than one may be."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, folder / _part(len(shards)), metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in _tensors(model, dtype):
        if held and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _part(number: int) -> str:
    return f"part-{number}.safetensors"
