"""LoRA out of the orbax checkpoints of other programs in JAX, read without those programs.

There a factor lies beside its kernel, and takes on the axes that the kernel has on its side of the product: A is
`[*in, r]`, B `[r, *out]`, with heads as an axis of their own, and B of a kernel that holds several matrices has their
number first, `[r, 2, heads, head_dim]` for keys and values. Here each matrix has its own pair, so those share one A.
"""

import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mora_jax.adapters.sites import by_path, sites
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import first, install, lora_of
from mora_jax.interop.load import load_shapes
from mora_jax.models.config import DecoderConfig
from mora_jax.models.decoder import Decoder
from mora_jax.paths import local_path


class Program(NamedTuple):
    """How a program stores LoRA.

    Attributes:
        factor: matches the path of a factor in the tree, with groups `layer`, `module` and `factor` ("a" or "b").
        matrices: by module, the last names of the matrices that its kernel holds, in order.
        has_alpha: whether updates are multiplied by alpha / rank, else by 1. Checkpoints don't hold it.
    """

    factor: re.Pattern[str]
    matrices: Mapping[str, tuple[str, ...]]
    has_alpha: bool


_ATTENTION = {
    "attn/q_einsum": ("q_proj",),
    "attn/kv_einsum": ("k_proj", "v_proj"),
    "attn/qkv_einsum": ("q_proj", "k_proj", "v_proj"),
    "attn/attn_vec_einsum": ("o_proj",),
}
_LINEAR = {
    "lm_head": ("lm_head",),
    **{f"attn/{name}": (name,) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp/{name}": (name,) for name in ("gate_proj", "up_proj", "down_proj")},
}
#: The programs whose logits were compared (`scripts/check_checkpoints.py`).
PROGRAMS = {
    "tunix": Program(
        re.compile(r"(layers/(?P<layer>\d+)/)?(?P<module>.+)/(w|kernel)_lora_(?P<factor>[ab])(/value)?"),
        _ATTENTION | _LINEAR,
        has_alpha=True,
    ),
    "gemma": Program(
        re.compile(r"layer_(?P<layer>\d+)/(?P<module>.+)/lora/(?P<factor>[ab])"),
        {f"{module}/_LoRAEinsum_0": names for module, names in _ATTENTION.items()}
        | {"mlp/_LoRAEinsum_gating_einsum": ("gate_proj", "up_proj"), "mlp/_LoRAEinsum_linear": ("down_proj",)},
        has_alpha=False,
    ),
}


def adapter_from_checkpoint(
    checkpoint: str | os.PathLike[str], program: str, base: str | os.PathLike[str], *, alpha: float | None = None
) -> tuple[Decoder, list[str]]:
    """Reads the LoRA in a checkpoint of another program; arrays of its base stay unread.

    Args:
        checkpoint: of Tunix: the folder of its checkpoint manager, whose newest step is taken, or that of a step; of
            gemma: where its parameters were saved, all of them or those of LoRA.
        program: one of `PROGRAMS`.
        base: HuggingFace folder or hub id of the model that it was trained on.
        alpha: of Qwix's rule, one for all matrices; only where the program has it.

    Returns:
        The model, whose base weights are shapes alone, with the adapter, for `save_adapter`; and the paths of the
        arrays that are no LoRA.

    Raises:
        InputError: it can't be read, holds no LoRA or something that the program's table doesn't name, or doesn't fit
            the model.
    """
    table = PROGRAMS[program]
    if table.has_alpha and alpha is None:
        raise InputError(f"checkpoints of {program} don't hold alpha: give the one of Qwix's rule with --alpha")
    if not table.has_alpha and alpha is not None:
        raise InputError(f"{program} has no alpha, its updates are A B: leave --alpha away")
    model = load_shapes(base)
    folder = _tree_folder(local_path(checkpoint), program)
    shapes, read = _open(folder)
    lora = [path for path in shapes if "lora" in path.lower()]
    if not lora:
        raise InputError(f"{folder} holds no LoRA: its arrays are {first(list(shapes))}")
    pairs: dict[tuple[str, ...], dict[str, str]] = {}
    for path in lora:
        match = table.factor.fullmatch(path)
        targets = () if match is None else _targets(model.config, table, match["module"], match["layer"])
        if match is None or not targets:
            raise InputError(f"{folder}: {path} is no LoRA that {program} is known to put on {model.config.family}")
        pairs.setdefault(targets, {})[match["factor"]] = path
    places = by_path(sites(model))
    for targets, pair in pairs.items():
        if missing := [name for name in targets if name not in places]:
            raise InputError(f"{folder}: the model has no {missing[0]} for {next(iter(pair.values()))}")
        if len(pair) < 2:
            raise InputError(f"{folder}: {next(iter(pair.values()))} has no other factor beside it")
        inputs, outputs = places[targets[0]][0].in_features, [places[name][0].out_features for name in targets]
        _check_shapes(folder, pair, shapes, inputs, outputs)
    arrays = read(lora)
    by_target = {}
    for targets, pair in pairs.items():
        a, b = arrays[pair["a"]], arrays[pair["b"]]
        rank = a.shape[-1]
        parts = [b] if len(targets) == 1 else np.moveaxis(b, 1, 0)
        for name, part in zip(targets, parts, strict=True):
            scaling = 1.0 if alpha is None else alpha / rank
            by_target[name] = lora_of(a.reshape(-1, rank), part.reshape(rank, -1), scaling)
    install(model, by_target)
    return model, [path for path in shapes if path not in arrays]


def matrix_paths(config: DecoderConfig, layer: int) -> dict[str, str]:
    """The module paths of a layer's matrices by their last names."""
    names = config.names
    paths = (*names.qkv, names.out, *names.gate_up, names.down)
    return {path.rpartition(".")[2]: f"{names.layer.format(layer=layer)}.{path}" for path in paths}


def _targets(config: DecoderConfig, table: Program, module: str, layer: str | None) -> tuple[str, ...]:
    """The module paths of the matrices in a kernel; empty where the table or the family doesn't have them."""
    known = {"lm_head": config.names.head} if layer is None else matrix_paths(config, int(layer))
    matrices = table.matrices.get(module, ())
    return tuple(known[name] for name in matrices) if known.keys() >= set(matrices) else ()


def _check_shapes(
    folder: Path, pair: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], inputs: int, outputs: list[int]
) -> None:
    a, b = shapes[pair["a"]], shapes[pair["b"]]
    if len(a) < 2 or math.prod(a[:-1]) != inputs:
        raise InputError(f"{folder}: {pair['a']} has shape {list(a)}, but the model has {inputs} inputs there")
    stack = () if len(outputs) == 1 else (len(outputs),)
    sizes = b[1 + len(stack) :]
    if b[: 1 + len(stack)] != (a[-1], *stack) or not sizes or {math.prod(sizes)} != set(outputs):
        expected = [a[-1], *stack, outputs[0]]
        raise InputError(f"{folder}: {pair['b']} has shape {list(b)}, but the model has {expected} there")


def _tree_folder(folder: Path, program: str) -> Path:
    """The folder of the tree of parameters in a checkpoint, of the newest step where there are several."""
    steps = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    step = max(steps, key=lambda path: int(path.name), default=folder)
    for candidate in (step, step / "model_params"):
        if (candidate / "_METADATA").is_file():
            return candidate
    raise InputError(f"{folder} is no orbax checkpoint of {program}: there is no _METADATA in it")


def _open(folder: Path) -> tuple[dict[str, tuple[int, ...]], Any]:
    """The shapes of a checkpoint's arrays by path, `a/b/c`, and a function that reads those of some paths."""
    from orbax import checkpoint as ocp

    logger = logging.getLogger("absl")
    level = logger.level
    checkpointer = ocp.PyTreeCheckpointer()

    def guarded(call: Any) -> Any:
        logger.setLevel(logging.CRITICAL)  # orbax reports to it what is said here in one line
        try:
            return call()
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"{folder} can't be read: {reason[0][:150]}") from None
        finally:
            logger.setLevel(level)

    metadata = guarded(lambda: checkpointer.metadata(folder)).item_metadata
    tree = getattr(metadata, "tree", None)
    if not isinstance(tree, dict):
        raise InputError(f"{folder} can't be read: it is damaged, or no tree of arrays")
    leaves = {"/".join(map(str, path)): (path, leaf) for path, leaf in flatten_dict(tree).items()}

    def read(paths: list[str]) -> dict[str, np.ndarray]:
        wanted = unflatten_dict(dict(leaves[path] for path in paths))
        how = unflatten_dict({leaves[path][0]: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths})
        request = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        restored = flatten_dict(guarded(lambda: checkpointer.restore(folder, args=request)))
        return {"/".join(map(str, path)): np.asarray(array, np.float32) for path, array in restored.items()}

    return {path: tuple(getattr(leaf, "shape", ())) for path, (_, leaf) in leaves.items()}, read
