"""LoRA out of the `.lora.h5` files that a backbone of keras-hub saves, read without keras.

keras cuts a kernel before its last axis: A is `[…, r]` and B `[r, last]`. Where the last axis is that of one head,
`[width, heads, r]` and `[r, head_dim]`, all heads share B. The update of the whole matrix is then a LoRA of rank
heads · r, whose B has that of keras once for each head, on its diagonal.

A file names a layer by its number among those with weights, depth first, so their order in a block stands here.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mora_jax.adapters.sites import by_path, sites
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import install, lora_of
from mora_jax.interop.convert.checkpoints import matrix_paths
from mora_jax.interop.convert.updates import thin
from mora_jax.interop.load import load_shapes
from mora_jax.models.decoder import Decoder
from mora_jax.paths import local_path


class Block(NamedTuple):
    """How keras-hub has a decoder block.

    Attributes:
        layers: its layers in the order of a file, itself first, a matrix by its last name, others empty.
        heads_first: whether kernels of queries, keys and values are `[heads, width, head_dim]`, not
            `[width, heads, head_dim]`.
    """

    layers: tuple[str, ...]
    heads_first: bool


_GEMMA = ("", "down_proj", "up_proj", "gate_proj")
_LLAMA = ("", "", "down_proj", "gate_proj", "up_proj", "", "", "o_proj", "v_proj")
#: By `model_type`, the blocks whose logits were compared (`scripts/check_checkpoints.py`).
BLOCKS = {
    "gemma": Block((*_GEMMA, "", "", "o_proj", "v_proj", "k_proj", "q_proj", ""), True),
    "gemma2": Block((*_GEMMA, "", "", "", "o_proj", "v_proj", "k_proj", "q_proj", "", ""), True),
    "gemma3_text": Block((*_GEMMA, "", "", "", "o_proj", "", "", "v_proj", "k_proj", "q_proj", "", ""), True),
    **dict.fromkeys(("llama", "qwen2"), Block((*_LLAMA, "k_proj", "q_proj"), False)),
    "qwen3": Block((*_LLAMA, "", "k_proj", "", "q_proj"), False),
}


def adapter_from_keras(file: str | os.PathLike[str], base: str | os.PathLike[str]) -> Decoder:
    """Reads a file of LoRA weights; keras multiplies A B by 1.

    Args:
        file: of keras' save_lora_weights, ends in .lora.h5.
        base: HuggingFace folder or hub id of the model that it was trained on.

    Returns:
        The model, whose base weights are shapes alone, with the adapter, for `save_adapter`.

    Raises:
        InputError: h5py is missing, the family's blocks aren't known, or the file can't be read or doesn't fit.
    """
    model, path = load_shapes(base), local_path(file)
    family = model.config.family
    if family not in BLOCKS:
        raise InputError(f"LoRA of keras-hub is read for {', '.join(BLOCKS)}, not for {family}")
    block, places, by_target = BLOCKS[family], by_path(sites(model)), {}
    for number, (a, b) in _read(path).items():
        index, position = divmod(number - 1, len(block.layers))  # the embedding is 0
        name = block.layers[position]
        target = matrix_paths(model.config, index).get(name, "")
        if target not in places:
            raise InputError(f"{path}: layer {number} is no matrix of {family} with {model.config.num_layers} layers")
        sizes = places[target][0].in_features, places[target][0].out_features
        factors = _factors(a, b, name in ("q_proj", "k_proj", "v_proj"), block.heads_first, *sizes)
        if factors is None:
            shapes = f"factors {list(a.shape)} and {list(b.shape)}"
            raise InputError(f"{path}: layer {number} has {shapes}, but {target} is {list(sizes)}")
        by_target[target] = lora_of(*factors)
    install(model, by_target)
    return model


def _read(path: Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """A and B by the numbers of their layers."""
    try:
        import h5py
    except ImportError:
        raise InputError("h5py is not installed, which reads files of keras: pip install h5py") from None
    factors: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    try:
        with h5py.File(path) as data:
            for name, layer in data["lora"].items():
                if name != "vars":  # that is the rank
                    a, b = (np.asarray(layer["vars"][f"lora_kernel_{factor}"], np.float32) for factor in "ab")
                    factors[int(name)] = a, b
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no readable .lora.h5 of keras-hub: {str(error)[:150]}") from None
    if not factors:
        raise InputError(f"{path} holds no LoRA")
    return factors


def _factors(
    a: np.ndarray, b: np.ndarray, has_heads: bool, heads_first: bool, inputs: int, outputs: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """`[in, r]` and `[r, out]` of keras' A and B; None where their shapes don't fit."""
    rank = a.shape[-1] if a.ndim else 0
    heads = outputs // b.shape[-1] if has_heads and b.ndim and b.shape[-1] else 1
    if rank == 0 or b.shape != (rank, outputs // heads) or outputs % heads:
        return None
    if not has_heads:
        return (a.reshape(inputs, rank), b) if a.size == inputs * rank else None
    if a.shape != ((heads, inputs, rank) if heads_first else (inputs, heads, rank)):
        return None
    by_head = a.transpose(1, 0, 2) if heads_first else a
    return thin((by_head.reshape(inputs, heads * rank), np.kron(np.eye(heads, dtype=np.float32), b)))
