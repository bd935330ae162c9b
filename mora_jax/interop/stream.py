"""A safetensors file written tensor by tensor, so that no more than one is held in memory.

The format: eight bytes with the length of the header (little endian), a JSON header with dtype, shape and place of each
tensor, padded with spaces to a multiple of eight bytes, and the tensors one behind the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: np.dtype | type = np.float32,
) -> None:
    """Writes tensors of one dtype as a safetensors file that torch's tools read.

    Args:
        path: the file.
        shapes: of every tensor, by name, in the order in which they are written.
        tensors: names and arrays in the same order; each is taken only when the one before is on the disk.
        dtype: float32, float16 or bfloat16; arrays are cast to it.
    """
    dtype = np.dtype(dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    expected = iter(shapes.items())
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors:
            assert (name, array.shape) == next(expected), f"{name} is not what the header says"
            # As bytes: numpy's buffers know no bfloat16.
            file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
        assert next(expected, None) is None, "the header promises more tensors"
