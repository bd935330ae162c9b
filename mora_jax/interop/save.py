"""Models as HuggingFace folders."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.base import host
from mora_jax.adapters.projection import Projection
from mora_jax.errors import InputError
from mora_jax.interop.atomic_folder import new_folder
from mora_jax.interop.hub import TOKENIZER_FILES
from mora_jax.interop.load import beside, open_named
from mora_jax.interop.safetensors_io import write_tensors
from mora_jax.interop.tensor_map import Entry, TensorRegion, dense_and_experts, tensor_plan
from mora_jax.models.config import DecoderConfig
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import family_of

#: Of models that read images.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
#: What a folder with a model holds, by names and patterns.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    *PROCESSOR_FILES,
    *TOKENIZER_FILES,
    "additional_chat_templates",
)
_DTYPES = ("float32", "bfloat16", "float16")


def save_pretrained(
    model: Decoder,
    out: str | os.PathLike[str],
    tokenizer: Any | None = None,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    write: bool = True,
) -> None:
    """Writes a model as a folder that `transformers` loads: config, weights, tokenizer, generation settings.

    Args:
        model: a model without adapters (merge them first).
        out: the folder; one that holds something is refused without `overwrite`.
        tokenizer: a transformers tokenizer to save with it; None to copy the files of the folder that the
            model was loaded from.
        dtype: "float32", "bfloat16" or "float16" on disk; None for float32, which loses nothing.
        max_shard_bytes: weights beyond this are split into several files with an index.
        overwrite: replace the model that is in `out`; files that belong to none stay there.
        write: False on all processes but one of those that hold parts of the model: all have to call this.

    Raises:
        InputError: when the model is none of this library's, or has adapters, or is quantised, or has biases that its
            family has no place for, when its tokenizer has grown and isn't given, when the dtype is another one or too
            narrow, or `out` is in use.

    Examples:
        >>> import mora_jax as mj
        >>> from mora_jax import demo
        >>> model, tokenizer = mj.load_pretrained(demo.model_path(), dtype="float32")
        >>> _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=0)
        >>> _ = mj.merge(model)
        >>> mj.save_pretrained(model, "merged", tokenizer)  # AutoModelForCausalLM.from_pretrained("merged")
    """
    if not isinstance(model, Decoder):
        raise InputError(
            f"save_pretrained writes this library's decoders as HuggingFace folders, not a {type(model).__name__}: "
            "save nnx.state(model) of your own merged model with orbax or safetensors, as at the end of "
            "docs/own_models.md, and an adapter with save_adapter"
        )
    if next(iter(adapters_of(model)), None) is not None:
        raise InputError("the model has unmerged adapters: call merge(model) first, or save them with save_adapter")
    if model.quantize != "none":
        raise InputError(
            f"the model holds rounded weights (quantize={model.quantize}): save its adapter with save_adapter, and the "
            "model from the files that it was loaded from"
        )
    target = _dtype(dtype)
    copied = ("generation_config.json", *PROCESSOR_FILES, *(() if tokenizer is not None else TOKENIZER_FILES))
    origin = None if model.folder is None else Path(model.folder)
    files = [] if origin is None else [origin / name for name in copied if (origin / name).is_file()]
    if model.added_tokens and any(file.name in TOKENIZER_FILES for file in files):
        raise InputError(
            f"the model has the added token {model.added_tokens[0]!r}, which the tokenizer in {origin} would split: "
            "give the one that was grown, tokenizer="
        )
    if not write:
        for _ in tensors_of(model, target):
            pass  # gathered for the process that writes
        return
    with new_folder(out, ours=MODEL_FILES, overwrite=overwrite) as folder:
        write_model(model, folder, dtype=target, max_shard_bytes=max_shard_bytes)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))


def write_model(
    model: Decoder, folder: Path, *, dtype: np.dtype | None = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes config and weights of the base into a folder; adapters are left out.

    Tensors are gathered from the devices and written one layer's after the other, so a model that was trained sharded
    is never in one memory as a whole.

    Args:
        model: its base is written.
        folder: exists.
        dtype: of the written weights; None: float32.
        max_shard_bytes: the largest file of weights.
    """
    target = _dtype(dtype)
    folder.mkdir(exist_ok=True)
    text = json.dumps(_config(model.config, target.name) | bias_fields(model), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    shards = _shards(model, target.itemsize, max_shard_bytes)
    tensors = tensors_of(model, target)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for file, shapes in zip(files, shards, strict=True):
        write_tensors(folder / file, shapes, itertools.islice(tensors, len(shapes)), target)
    if len(shards) > 1:
        names = {name: file for file, shapes in zip(files, shards, strict=True) for name in shapes}
        total = target.itemsize * sum(math.prod(shape) for shapes in shards for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(model: Decoder, itemsize: int, max_shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the tensors of each file, none larger than allowed unless a single tensor is."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in _shapes(model):
        nbytes = itemsize * math.prod(shape)
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def _shapes(model: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what `tensors_of` gives, in its order."""
    for entry in tensor_plan(model):
        yield from ((_stored(model, piece.name), piece.shape) for piece in entry.pieces)
    yield from ((name, zeros.shape) for name, zeros in zero_biases(model))
    yield from ((name, shape) for name, shape, _ in beside_of(model))


def _stored(model: Decoder, name: str) -> str:
    """A tensor's name in files, where a head may have another than its module."""
    names = model.config.names
    return names.head_tensor if name == f"{names.head}.weight" else name


def _dtype(dtype: Any) -> np.dtype:
    with contextlib.suppress(TypeError):
        np_dtype = jnp.dtype(np.float32 if dtype is None else dtype)
        if np_dtype.name in _DTYPES:
            return np_dtype
    raise InputError(f"a model is saved in one of {', '.join(_DTYPES)}, not {dtype!r}")


def _config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The original `config.json` with the dtype of the new file, under the spelling that it used."""
    family = family_of(config)
    values = {"architectures": [family.architecture], "model_type": family.model_type} | config.hf_config
    spellings = [name for name in ("dtype", "torch_dtype") if name in values] or ["torch_dtype"]
    return values | dict.fromkeys(spellings, dtype)


def tensors_of(model: Decoder, dtype: np.dtype | type = np.float32) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as files have it, in the dtype of files."""
    for entry in tensor_plan(model):
        for piece, tensor in _gathered(entry):
            with np.errstate(over="ignore"):
                stored = tensor.astype(dtype)
            if dtype == np.float16 and not np.isfinite(stored).all():
                raise InputError(f"tensor {piece.name} has values that float16 cannot hold; save in another dtype")
            yield _stored(model, piece.name), stored
    for name, zeros in zero_biases(model):
        yield name, zeros.astype(dtype)
    yield from ((name, read(name).astype(dtype)) for name, _, read in beside_of(model))


def beside_of(model: Decoder) -> list[tuple[str, tuple[int, ...], Callable[[str], np.ndarray]]]:
    """What the files that a model came from hold beside the text model: names, shapes, and what reads a tensor."""
    if model.folder is None or not family_of(model.config).beside:
        return []
    files = open_named(Path(model.folder), model.config)
    return [(name, files.shapes[name], files.read) for name in beside(files, model.config)]


def _gathered(entry: Entry) -> Iterator[tuple[TensorRegion, np.ndarray]]:
    """The tensors of one parameter; of a stack no more than one layer is brought from the devices at once."""
    array = entry.parameter.get_value()
    for layer, group in itertools.groupby(entry.pieces, key=lambda piece: piece.index[0] if piece.index else None):
        if isinstance(layer, int):
            part = host(_layer(array, layer)).reshape(entry.shape[1:])
            yield from ((piece, dataclasses.replace(piece, index=piece.index[1:]).take(part)) for piece in group)
        else:
            # Through a copy: an array keeps what it once gathered from its devices for as long as it lives.
            values = host(array.copy()).reshape(entry.shape)
            yield from ((piece, piece.take(values)) for piece in group)


@jax.jit
def _layer(stack: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def bias_fields(model: Decoder) -> dict[str, bool]:
    """The fields of `config.json` that announce the biases that were added; empty where there are none.

    Raises:
        InputError: the family has no field for one of them.
    """
    parts = _parts(model)
    added = {part: projection for part, projection, announced in parts if projection.bias is not None and not announced}
    announcing = family_of(model.config).bias_fields
    fields = {name: True for name, places in announcing.items() if set(places) & set(added)}
    stray = [projection for part, projection in added.items() if not any(part in announcing[name] for name in fields)]
    if stray:
        names = ", ".join(part.name for part in stray[0].parts)
        raise InputError(
            f"the adapter gave biases to {names}, for which {model.config.family} models have no place: use the "
            "adapter beside its base, without merging"
        )
    return fields


def zero_biases(model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """The biases that `bias_fields` announces beside those that the model has."""
    announcing = family_of(model.config).bias_fields
    for name in bias_fields(model):
        for place, projection, _ in _parts(model):
            if place in announcing[name] and projection.bias is None:
                for layer in range(projection.num_layers or 0):
                    for i, part in enumerate(projection.parts):
                        path = projection.module_path(part.name, layer)
                        yield f"{path}.bias", np.zeros(projection.layout.part_features(i), np.float32)


def _parts(model: Decoder) -> Iterator[tuple[str, Projection, bool]]:
    """The projections of each stack of layers: name, module, and whether the config announces its bias."""
    if model.layer_inputs is not None:
        yield "layer_inputs", model.layer_inputs.projection, False
    for stack, block in zip(itertools.chain(*model.config.runs), model.blocks, strict=True):
        mixer, (dense, _) = block.self_attn, dense_and_experts(block.mlp)
        if stack.delta is None:
            yield "qkv", mixer.qkv_proj, stack.qkv_bias
            yield "out", mixer.o_proj, stack.out_bias
        else:
            yield "delta_in", mixer.in_proj, False
            yield "delta_out", mixer.out_proj, False
        if stack.layer_input is not None:
            yield "input_gate", block.layer_input.gate_proj, False
            yield "input_out", block.layer_input.out_proj, False
        if dense is not None:  # adapters give experts no biases
            yield "gate_up", dense.gate_up_proj, stack.mlp_bias
            yield "down", dense.down_proj, stack.mlp_bias
