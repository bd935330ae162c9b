"""What a base model is, in a few letters: a hash over its tensors, cheap enough for every start of a run.

Names, dtypes, shapes and a sample of every tensor's bytes go in: all of a small tensor, of a large one 16 blocks of
4 KiB, evenly spread from its first byte to its last. Any other training of the same architecture changes nearly every
weight, so the sample tells them apart; it is no protection against somebody who wants to deceive. How the tensors are
shared out over files, in which order, and where the folder is makes no difference.
"""

import contextlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from flax import nnx

from mora_jax.adapters.base import AdapterParam, FullParam
from mora_jax.errors import InputError
from mora_jax.interop.safetensors_io import checkpoint_files

_BLOCK, _BLOCKS = 4096, 16
_BASE = nnx.Any(FullParam, nnx.All(nnx.Param, nnx.Not(AdapterParam)))


def base_hash(folder: str | Path) -> str:
    """The hash of the safetensors files of a HuggingFace folder, as `xxh3:` and 32 hexadecimal digits.

    Raises:
        InputError: a file is missing or isn't a safetensors file.
    """
    tensors: list[tuple[str, Any, int, dict[str, Any]]] = []
    total = xxhash.xxh3_128()
    with contextlib.ExitStack() as opened:
        for file in checkpoint_files(Path(folder)):
            start, header = _header(file)
            handle = opened.enter_context(file.open("rb"))
            tensors += [(name, handle, start, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, handle, start, entry in sorted(tensors, key=lambda tensor: tensor[0]):
            total.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            first, end = entry["data_offsets"]
            _sample(total, handle, start + first, end - first)
    return f"xxh3:{total.hexdigest()}"


def arrays_hash(model: nnx.Module, kind: Any = _BASE) -> str:
    """The hash of the parameters of a model in memory, its adapters left out or of a `kind`; of large ones a sample."""
    total = xxhash.xxh3_128()
    for path, variable in nnx.to_flat_state(nnx.state(model, kind)):
        array = variable.get_value().reshape(-1)
        total.update(json.dumps([[str(part) for part in path], array.dtype.name, variable.shape]).encode())
        total.update(np.asarray(array[:: max(1, array.size // 16384)]).tobytes())
    return f"xxh3:{total.hexdigest()}"


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and the JSON header."""
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            return 8 + length, json.loads(handle.read(length))
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"{file} is not a complete safetensors file ({error}): download it again") from None


def _sample(total: xxhash.xxh3_128, handle: BinaryIO, start: int, size: int) -> None:
    if size <= _BLOCK * _BLOCKS:
        starts, length = [0], size
    else:
        starts, length = [index * (size - _BLOCK) // (_BLOCKS - 1) for index in range(_BLOCKS)], _BLOCK
    for offset in starts:
        handle.seek(start + offset)
        total.update(handle.read(length))
