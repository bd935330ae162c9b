"""Base models from HuggingFace folders."""

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.products.quantization import FORMATS
from mora_jax.backend import read_dtype
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import first
from mora_jax.interop.hub import load_tokenizer, local_folder
from mora_jax.interop.mxfp4 import BLOCKS, Mxfp4Files
from mora_jax.interop.safetensors_io import TensorFiles, open_checkpoint
from mora_jax.interop.sharded_read import Shardings, read_parameter
from mora_jax.interop.tensor_map import Entry, tensor_plan
from mora_jax.models.attention.kernels import AttentionChoice
from mora_jax.models.config import DecoderConfig
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import family_of, read_config
from mora_jax.models.init import read_json
from mora_jax.models.partitioning import lay_kernels
from mora_jax.paths import found_path


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    unroll: int | None = None,
    remat: str = "none",
    quantize: str = "none",
    attention: str = "auto",
    shardings: Callable[[Decoder], Shardings] | None = None,
) -> tuple[Decoder, Any | None]:
    """Loads a model and its tokenizer.

    Args:
        path: a HuggingFace model folder with safetensors weights, or a hub id.
        dtype: "float32" or "bfloat16": compute dtype and storage of the weights; None: bfloat16 where it
            is fast.
        unroll: ignored: layers run in a loop. It will go.
        remat: "none", "dots", "full" or "offload".
        quantize: how the layers' kernels are held: "none" as they are, "int8" or "nf4" quantised. Each is quantised
            as it is read, layer by layer. Such a base is frozen: it carries adapters, and can't be trained or merged.
        attention: what computes attention: "auto", "xla", "splash" or "cudnn" (see docs/mesh.md).
        shardings: from the model's shapes to the sharding of each parameter. They are read straight into their shards,
            so that no process holds more of the base than its devices do. None: whole, on the default device.

    Returns:
        The model, and a transformers tokenizer or None when the folder has no tokenizer files.

    Raises:
        InputError: when the folder cannot be used; the message says why.

    Examples:
        >>> import mora_jax as mj
        >>> from mora_jax import demo
        >>> model, tokenizer = mj.load_pretrained(demo.model_path(), dtype="float32")
        >>> model.config.num_layers, tokenizer.decode(tokenizer("The cat")["input_ids"], skip_special_tokens=True)
        (4, ' The cat')
    """
    folder, config, files = _open(path)
    compute = read_dtype(dtype)
    if quantize not in ("none", *FORMATS):
        raise InputError(f"quantize {quantize!r} is not supported; give one of none, {', '.join(FORMATS)}")
    how: dict[str, Any] = {"remat": remat, "quantize": quantize, "attention": AttentionChoice(attention)}
    # Beside the weights: transformers takes as long to import as those of a small model to read.
    with ThreadPoolExecutor(1) as threads:
        tokenizer = threads.submit(load_tokenizer, folder)
        # Shapes alone first: the weights then exist only once, built parameter by parameter.
        model = nnx.eval_shape(lambda: Decoder(config, dtype=compute, rngs=None, **how))
        placed = shardings(model) if shardings else None
        if placed is None:
            lay_kernels(model)
        plan, stored_as, others = _checked_plan(model, files)
        if others:
            warnings.warn(
                f"{files.folder}: the text part is loaded; {len(others)} tensors beside it are not, such as"
                f" {first(sorted(others))}; save_pretrained writes them back",
                stacklevel=2,
            )
        for entry in plan:
            read_parameter(entry, files, stored_as, placed)
            if tokenizer.done():
                tokenizer.result()  # a broken one is told at once
        model.name_or_path, model.folder = found_path(os.fspath(path)), str(folder)
        return model, tokenizer.result()


def load_shapes(path: str | os.PathLike[str]) -> Decoder:
    """The model of a folder without its weights: structure, names and shapes, for work on adapters alone.

    Raises:
        InputError: when the folder cannot be used; the message says why.
    """
    folder, config, files = _open(path)
    model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.float32, rngs=None))
    _checked_plan(model, files)
    model.name_or_path, model.folder = found_path(os.fspath(path)), str(folder)
    return model


def _open(path: str | os.PathLike[str]) -> tuple[Path, DecoderConfig, TensorFiles]:
    """A model's folder with its configuration and its tensors, compared."""
    folder = local_folder(path)
    config = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    files = open_named(folder, config)
    _check_sizes(config, files)
    return folder, _with_real_tying(config, files), files


def open_named(folder: Path, config: DecoderConfig) -> TensorFiles:
    """The weights of a folder by the names that they have in models of today."""
    files = open_checkpoint(folder)
    for old, new in family_of(config).older.items():
        files.rename(partial(re.sub, rf"\A{re.escape(old)}", new))
    base = config.names.embedding.partition(".")[0] + "."
    if not any(name.startswith(base) for name in files.shapes):  # saved without the head's class around it
        files.rename(lambda name: name if name == f"{config.names.head}.weight" else base + name)
    return Mxfp4Files(files) if any(name.endswith(BLOCKS) for name in files.shapes) else files


def beside(files: TensorFiles, config: DecoderConfig) -> list[str]:
    """Names of tensors that are no part of the text model."""
    return [name for name in files.shapes if name.startswith(family_of(config).beside)]


def _check_sizes(config: DecoderConfig, files: TensorFiles) -> None:
    """Compares the sizes of a config with the tensors, before anything is made in these sizes."""
    names = config.names
    table = files.shapes.get(f"{names.embedding}.weight") or files.shapes.get(f"{names.head}.weight")
    before, after = names.layer.split("{layer}")
    layer = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}\.")
    numbers = [int(match.group(1)) for match in map(layer.match, files.shapes) if match]

    def shape_in_first_layer(name: str) -> tuple[int, ...] | None:
        return files.shapes.get(f"{names.layer.format(layer=0)}.{name}.weight")

    down, q, k = map(shape_in_first_layer, (names.down, names.qkv[0], names.qkv[-1]))
    if len(names.qkv) == 1:  # one tensor for q, k and v is compared later, with all others
        q = k = None
    first = config.by_layer[0]
    stated: list[tuple[str, int, int | None]] = [
        ("num_hidden_layers", config.num_layers, max(numbers) + 1 if numbers else None),
        ("vocab_size", config.vocab_size, table[0] if table else None),
        ("hidden_size", config.hidden_size, table[-1] if table else None),
        ("intermediate_size", config.intermediate_size, down[0 if names.turned else -1] if down else None),
        ("num_attention_heads × head_dim", first.num_heads * first.head_dim, q[0] if q else None),
        ("num_key_value_heads × head_dim", first.num_kv_heads * first.head_dim, k[0] if k else None),
    ]
    wrong = [f"{name} is {size}, the tensors have {found}" for name, size, found in stated if found not in (None, size)]
    if wrong:
        raise InputError(f"{files.folder}: config.json does not describe the weights beside it: {'; '.join(wrong)}")


def _with_real_tying(config: DecoderConfig, files: TensorFiles) -> DecoderConfig:
    """Unties a head that the config calls tied but whose stored weights differ, as transformers does."""
    head, embedding = (f"{path}.weight" for path in (config.names.head, config.names.embedding))
    if not config.tie_embeddings or head not in files or embedding not in files:
        return config
    if files.shapes[head] == files.shapes[embedding] and np.array_equal(files.read(head), files.read(embedding)):
        return config
    warnings.warn(
        f"{files.folder}: config.json ties {head} to {embedding}, but the file has different values for "
        "both; they are kept apart",
        stacklevel=3,
    )
    source = config.hf_config | {"tie_word_embeddings": False}
    return dataclasses.replace(config, tie_embeddings=False, source=json.dumps(source))


def _checked_plan(model: Decoder, files: TensorFiles) -> tuple[list[Entry], dict[str, str], list[str]]:
    """The parameters of a model, names that the files have otherwise, and names of tensors that it has no part for.

    Raises:
        InputError: the names and shapes of the files' tensors are not those of the model's.
    """
    plan, names, others = tensor_plan(model), model.config.names, beside(files, model.config)
    head, embedding = f"{names.head}.weight", f"{names.embedding}.weight"
    # A tied checkpoint may store the head alone.
    alone = model.config.tie_embeddings and embedding not in files and head in files
    stored_as = {embedding: head} if alone else {}
    pieces = [piece for entry in plan for piece in entry.pieces]
    stored = [stored_as.get(piece.name, piece.name) for piece in pieces]
    missing = [name for name in stored if name not in files]
    if missing:
        raise InputError(f"{files.folder}: {len(missing)} tensors are missing: {first(missing)}")
    # A head that is not wanted here equals the embedding (checked before).
    extra = sorted(set(files.shapes) - {*stored, *others, "lm_head.weight"})
    if extra:
        raise InputError(f"{files.folder}: {len(extra)} tensors do not belong to the architecture: {first(extra)}")
    for piece, name in zip(pieces, stored, strict=True):
        if files.shapes[name] != piece.shape:
            raise InputError(
                f"{files.folder}: tensor {name} has shape {list(files.shapes[name])}, but config.json "
                f"implies {list(piece.shape)}"
            )
    return plan, stored_as, others
