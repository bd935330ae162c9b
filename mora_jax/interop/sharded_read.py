"""Parameters of a decoder read from files region by region: what a device doesn't hold is never read for it."""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from mora_jax.adapters.products.quantization import BLOCK, ROWS_PER_BLOCK, QuantizedKernel, quantize
from mora_jax.interop.safetensors_io import TensorFiles
from mora_jax.interop.tensor_map import Entry, TensorRegion, transposed

#: The sharding of each parameter of a model.
Shardings = Callable[[nnx.Variable], Sharding]


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory for an array that a CPU's XLA takes over as it is: it copies what doesn't begin at a multiple of 64."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def read_parameter(entry: Entry, files: TensorFiles, stored_as: Mapping[str, str], shardings: Shardings | None) -> None:
    """Gives a parameter its values on its devices; each region is read when its device's turn comes, and freed again.

    Of a quantised kernel `[L, in, *out]` or `[L, E, in, *out]` codes and scales come from one reading.

    Args:
        entry: the parameter and the tensors that make it up.
        files: where they are.
        stored_as: names of tensors in files that differ from the entry's.
        shardings: where it lies, or its codes and scales; None: whole, on the default device.
    """
    parameter, read = entry.parameter, partial(read_region, entry, files, stored_as)
    parts: list[tuple[nnx.Variable, Callable[..., np.ndarray]]]
    if isinstance(parameter, QuantizedKernel):
        blocks = _Blocks(entry, partial(read, np.float32))
        parts = [(parameter.values, blocks.codes), (parameter.scales, blocks.scales)]
    else:
        parts = [(parameter, partial(read, parameter.dtype))]
    for variable, make in parts:
        sharding = shardings(variable) if shardings else None
        variable.set_value(made_in_place(tuple(variable.shape), sharding, make))


def made_in_place(
    shape: tuple[int, ...], sharding: Sharding | None, make: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array on its devices, each region made by `make` when its device's turn comes."""
    if sharding is None:
        return jax.device_put(make(tuple(slice(0, size) for size in shape)))
    last: dict[Any, np.ndarray] = {}

    def region(index: Any) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in last:  # devices with copies of one region follow each other
            last.clear()
            last[key] = make(index)
        return last[key]

    return jax.make_array_from_callback(shape, sharding, region)


def read_region(
    entry: Entry, files: TensorFiles, stored_as: Mapping[str, str], dtype: Any, index: tuple[slice, ...]
) -> np.ndarray:
    """The values of `parameter[index]`; of each tensor only the rows and columns needed are read.

    Args:
        entry: the parameter and the tensors that make it up.
        files: the checkpoint.
        stored_as: names in the files that differ from those of `entry`.
        dtype: of the result.
        index: a span of each axis of the parameter.
    """
    shape, last = entry.shape, len(index) - 1
    as_matrices = len(index) < len(shape)
    spans = (*index[:last], *(slice(None),) * (len(shape) - last)) if as_matrices else index
    box = [range(size)[part] for part, size in zip(spans, shape, strict=True)]
    values = empty(tuple(map(len, box)), dtype)
    for piece in entry.pieces:
        overlap = _shared(piece, shape, box)
        if overlap is not None:
            target, inner = overlap
            values[target] = _read(piece, files, stored_as.get(piece.name, piece.name), inner)
    return values.reshape(*values.shape[:last], -1)[..., index[last]] if as_matrices else values


def _shared(
    piece: TensorRegion, shape: tuple[int, ...], box: list[range]
) -> tuple[tuple[Any, ...], list[range]] | None:
    """What a piece and a box of the parameter share: where that is in the box, and in the piece's region."""
    target: list[Any] = []
    inner: list[range] = []
    for i, (size, wanted) in enumerate(zip(shape, box, strict=True)):
        part = piece.index[i] if i < len(piece.index) else slice(None)
        if isinstance(part, int):
            if part not in wanted:
                return None
            target.append(part - wanted.start)
            continue
        held = range(size)[part]
        start, stop = max(held.start, wanted.start), min(held.stop, wanted.stop)
        if start >= stop:
            return None
        target.append(slice(start - wanted.start, stop - wanted.start))
        inner.append(range(start - held.start, stop - held.start))
    return tuple(target), inner


def _read(piece: TensorRegion, files: TensorFiles, name: str, inner: list[range]) -> np.ndarray:
    """Part of a tensor, laid out as the piece's region is."""
    sizes = [len(part) for part in inner]
    if not piece.matrix:
        part = tuple(slice(part.start, part.stop) for part in inner)
        if piece.shape == piece.region:
            return files.read_part(name, part)
        return files.read(name).reshape(piece.region)[part]
    lead = len(piece.shape) - 2  # one axis of a tensor [experts, out, in]
    *beside, columns = (slice(part.start, part.stop) for part in inner[: lead + 1])
    # The rows of a tensor [out, in] are the region's output axes, flattened: the smallest run that holds all wanted.
    flat = np.arange(piece.shape[-2]).reshape(piece.region[lead + 1 :])[np.ix_(*inner[lead + 1 :])].ravel()
    first, last = int(flat[0]), int(flat[-1]) + 1
    rows = files.read_part(name, (*beside, slice(first, last), columns))
    return transposed(rows if len(flat) == last - first else rows[..., flat - first, :]).reshape(sizes)


class _Blocks:
    """The blocks of a kernel, read and quantised tensor by tensor of files; scales that came with codes are kept."""

    def __init__(self, entry: Entry, read: Callable[..., np.ndarray]):
        kernel: QuantizedKernel = entry.parameter
        self._read, self._kernel = read, kernel
        self._scales = empty(tuple(kernel.scales.shape), np.float32)
        self._known = np.zeros(self._scales.shape, bool)
        self._stack = kernel.ndim - 1 - kernel.out_axes
        # The axes of the stack along which each tensor has one place; some files have all experts of a layer in one.
        self._apart = sum(isinstance(part, int) for part in entry.pieces[0].index)

    def codes(self, index: tuple[slice, ...]) -> np.ndarray:
        """`values[index]`: the blocks that it touches are quantised whole."""
        values, rows = self._kernel.values, self._stack
        box = [range(size)[part] for part, size in zip(index, values.shape, strict=True)]
        height = ROWS_PER_BLOCK[self._kernel.format]
        first, last = box[rows].start // height, -(-box[rows].stop // height)
        start = box[rows].start - first * height
        codes = empty(tuple(map(len, box)), values.dtype)
        for places in itertools.product(*map(enumerate, box[: self._apart])):
            blocks = self._quantized(tuple(n for _, n in places), slice(first, last), index)
            here = (*(slice(None) for _ in box[self._apart : rows]), slice(start, start + len(box[rows])))
            codes[tuple(i for i, _ in places)] = blocks[here]
        return codes

    def scales(self, index: tuple[slice, ...]) -> np.ndarray:
        """`scales[index]`; only what no codes brought is read."""
        apart = self._apart
        box = [range(size)[part] for part, size in zip(index, self._scales.shape, strict=True)]
        for places in itertools.product(*box[:apart]):
            where: Any = (*places, *index[apart:])
            if not self._known[where].all():
                self._quantized(places, index[self._stack], index)
        return self._scales[index]

    def _quantized(self, places: tuple[int, ...], blocks: slice, index: tuple[slice, ...]) -> np.ndarray:
        """The codes of some blocks of what stands at `places`, cut by the rest of `index`; their scales are kept."""
        first, last, _ = blocks.indices(self._scales.shape[self._stack])
        inputs = slice(first * BLOCK, min(last * BLOCK, self._kernel.in_features))
        beside, out = index[self._apart : self._stack], index[self._stack + 1 :]
        here = (*(slice(n, n + 1) for n in places), *beside, inputs, *out)
        part = self._read(here)[(0,) * len(places)]
        where: Any = (*places, *beside, slice(first, last), *out)
        matrices = part.reshape(-1, *part.shape[len(beside) :])
        codes, scales = zip(*(quantize(matrix, self._kernel.format) for matrix in matrices), strict=True)
        self._scales[where] = np.stack(scales).reshape(self._scales[where].shape)
        self._known[where] = True
        return np.stack(codes).reshape(*part.shape[: len(beside)], *codes[0].shape)
