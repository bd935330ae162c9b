"""The difference of two checkpoints as updates of the matrices of one model, read tensor by tensor."""

import functools
import os

import numpy as np

from mora_jax.adapters.config import Targets
from mora_jax.adapters.sites import sites
from mora_jax.adapters.targets import matcher
from mora_jax.errors import InputError, refused
from mora_jax.interop.adapter_values import first, install
from mora_jax.interop.convert.convert import Conversion, lora_values, mora_values
from mora_jax.interop.convert.updates import Update
from mora_jax.interop.hub import local_folder
from mora_jax.interop.load import load_shapes
from mora_jax.interop.safetensors_io import TensorFiles, open_checkpoint
from mora_jax.models.decoder import Decoder


def adapter_from_difference(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    rank: int | None,
    kind: str | None = None,
    targets: Targets = "all-linear",
) -> tuple[Decoder, Conversion]:
    """Extracts an adapter from a full fine-tune: the nearest to `tuned − base`, matrix by matrix.

    Neither model is ever in memory: tensors are read one at a time, and the model that is returned has only the shapes
    of its base weights. Save it with `save_adapter`.

    Args:
        base: HuggingFace folder or hub id of the model before.
        tuned: the model after, of the same shapes.
        rank: of the LoRA, or of MoRA's parameters; None is refused with the error of some ranks.
        kind: a kind of MoRA; None for LoRA.
        targets: which matrices, as in `LoRAConfig`.

    Returns:
        The model with the adapter, and the error of each matrix.

    Raises:
        InputError: the checkpoints can't be read or don't match, or no rank is given.
    """
    model = load_shapes(base)
    before, after = open_checkpoint(local_folder(base)), open_checkpoint(local_folder(tuned))
    _check_same(before, after)
    with refused():
        matches = matcher(targets)
    updates = []
    for place in sites(model):
        for path in (path for path in place.paths if matches(path, place.is_linear)):
            kernel = functools.partial(_kernel, before, after, f"{path}.weight", place.is_embedding)
            sizes = place.in_features, place.out_features
            updates.append(Update(path, *sizes, place.is_embedding, "a difference of weights", kernel, None, None))
    if not updates:
        raise InputError(f"targets {targets!r} match no matrix of {base}")
    if kind is None:
        by_path, conversion = lora_values(updates, rank)
    else:
        by_path, conversion = mora_values(updates, kind, rank)
    taken = {f"{update.path}.weight" for update in updates}
    rest = {name: float(np.linalg.norm(_change(before, after, name))) for name in sorted(set(before.shapes) - taken)}
    install(model, by_path)
    changed = {name: norm for name, norm in rest.items() if norm > 0}
    return model, Conversion(conversion.method, conversion.rows, changed)


def _check_same(before: TensorFiles, after: TensorFiles) -> None:
    for one, other in ((before, after), (after, before)):
        absent = sorted(set(one.shapes) - set(other.shapes))
        if absent:
            raise InputError(f"{other.folder} lacks {len(absent)} tensors of {one.folder}: {first(absent)}")
    for name, shape in before.shapes.items():
        if after.shapes[name] != shape:
            raise InputError(
                f"tensor {name} has shape {list(shape)} in {before.folder}, but {list(after.shapes[name])} in "
                f"{after.folder}; only models of the same shapes have a difference"
            )


def _kernel(before: TensorFiles, after: TensorFiles, name: str, is_embedding: bool) -> np.ndarray:
    """float32 `[in, out]`; embedding tables lie so in files, other matrices transposed."""
    change = _change(before, after, name)
    return change if is_embedding else change.T


def _change(before: TensorFiles, after: TensorFiles, name: str) -> np.ndarray:
    return after.read(name).astype(np.float32) - before.read(name).astype(np.float32)
