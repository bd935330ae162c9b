"""What a folder holds, in numbers and words: a base model, or an adapter."""

import math
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from flax import nnx

from mora_jax.adapters.attach import attach
from mora_jax.adapters.methods.registry import CONFIGS
from mora_jax.adapters.sites import sites
from mora_jax.adapters.targets import Picker, summary
from mora_jax.errors import InputError
from mora_jax.interop.hub import TOKENIZER_FILES, local_folder
from mora_jax.interop.load import load_shapes
from mora_jax.interop.peft.config import AdapterFile, format_of
from mora_jax.interop.peft.format import CONFIG_NAME, WEIGHTS
from mora_jax.interop.peft.lora import mora_kind
from mora_jax.interop.peft.stored import meaning
from mora_jax.interop.safetensors_io import open_checkpoint, weight_bytes
from mora_jax.interop.tensor_map import tensor_plan
from mora_jax.models.decoder import Decoder
from mora_jax.models.init import read_json


def describe_model(path: str | os.PathLike[str], rank: int = 8) -> dict[str, Any]:
    """A base model: family, sizes, parameters by part, tensors, template, and what each method would train.

    Nothing but headers is read.

    Args:
        path: a HuggingFace folder or hub id.
        rank: of the methods that have one.

    Returns:
        Plain values for JSON. `parameters` counts tied weights once; `parts` are by part, `targets` by the end of a
        module's path, `methods` the numbers that each method trains, or why it can't.

    Raises:
        InputError: the folder can't be used.
    """
    model, folder = load_shapes(path), local_folder(path)
    config, pieces = model.config, [piece for entry in tensor_plan(model) for piece in entry.pieces]
    parts: Counter[str] = Counter()
    for piece in pieces:
        parts[_part(piece.name, model)] += math.prod(piece.shape)
    targets: dict[str, dict[str, Any]] = {}
    everything = Picker(CONFIGS["lora"](targets="all-linear"))  # type: ignore[call-arg]
    for place in sites(model):
        end = place.paths[0].rpartition(".")[2]
        linear = any(everything(name, is_linear=place.is_linear) for name in place.paths)
        layers = len(place.paths) + targets.get(end, {"layers": 0})["layers"]
        targets[end] = {"layers": layers, "in": place.in_features, "out": place.out_features, "all_linear": linear}
    return {
        "kind": "model",
        "path": str(folder),
        "family": config.family,
        "architecture": (config.hf_config.get("architectures") or [None])[0],
        "parameters": sum(parts.values()),
        "parts": dict(parts),
        "tied": config.tie_embeddings,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": config.max_positions,
        "tensors": len(pieces),
        "bytes": weight_bytes(folder),
        "tokenizer": any((folder / name).exists() for name in TOKENIZER_FILES),
        "template": _has_template(folder),
        "targets": targets,
        "rank": rank,
        "methods": {name: _trained(model, name, rank) for name in CONFIGS},
    }


def _part(name: str, model: Decoder) -> str:
    """The part of the model that a tensor belongs to."""
    names = model.config.names
    if name.startswith(f"{names.embedding}."):
        return "embedding"
    if name.startswith(f"{names.head}."):
        return "head"
    parts = {"norm": "norms", "expert": "experts", "attn": "attention", "mlp": "mlp"}
    return next((part for word, part in parts.items() if word in name), "other")


def _has_template(folder: Path) -> bool:
    files, settings = ("chat_template.jinja", "chat_template.json"), folder / "tokenizer_config.json"
    stated = settings.exists() and bool(read_json(settings).get("chat_template"))
    return stated or any((folder / name).exists() for name in files)


def _trained(model: Decoder, method: str, rank: int) -> int | str:
    """The numbers that a method trains on a copy of the model of shapes alone; in words why none."""
    kind = CONFIGS[method]
    settings = {"rank": rank} if "rank" in kind.settings() else {}
    counts: list[int] = []

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a rank that is too high here is no matter
            counts.append(attach(nnx.clone(model), kind.for_run(settings, None), rngs=0).trainable)

    try:
        nnx.eval_shape(run)
    except ValueError as error:
        return str(error)
    return counts[0]


def describe_adapter(path: str | os.PathLike[str]) -> dict[str, Any]:
    """An adapter's folder: type, settings, base, modules and tensors.

    Args:
        path: the folder, or a hub id.

    Raises:
        InputError: it can't be read.
    """
    folder = local_folder(path)
    where = str(folder / CONFIG_NAME)
    values, files = read_json(folder / CONFIG_NAME), open_checkpoint(folder, WEIGHTS)
    form, mora = format_of(values, where), mora_kind(values, where)
    config = AdapterFile(form, values, where)
    names = ("r", "kind", "lora_dropout") if mora else (*form.settings, "r", "lora_alpha")
    given = {**values, "kind": mora}
    modules = {meaning(name)[1] for name in files.shapes if meaning(name)[0] == "factors"}
    return {
        "kind": "adapter",
        "path": str(folder),
        "type": form.peft_type,
        "method": form.methods[0] if mora is None else "mora",
        "settings": {name: given[name] for name in names if given.get(name) is not None},
        "base": values.get("base_model_name_or_path"),
        "targets": values.get("target_modules"),
        "target_parameters": values.get("target_parameters") or [],
        "bias": config.bias,
        "modules_to_save": values.get("modules_to_save") or [],
        "modules": len(modules),
        "module_names": summary(sorted(modules)),
        "tensors": len(files.shapes),
        "parameters": sum(math.prod(shape) for shape in files.shapes.values()),
        "bytes": weight_bytes(folder),
    }


def describe(path: str, rank: int = 8) -> dict[str, Any]:
    """`describe_model` or `describe_adapter`, whichever the folder holds.

    Args:
        path: a folder or hub id.
        rank: as for `describe_model`.

    Raises:
        InputError: it holds neither, or can't be read.
    """
    folder = local_folder(path)
    if (folder / CONFIG_NAME).is_file():
        return describe_adapter(path)
    if (folder / "config.json").is_file():
        return describe_model(path, rank)
    raise InputError(f"{path} holds neither config.json nor adapter_config.json, so it is no model, adapter or run")
