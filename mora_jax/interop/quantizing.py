"""Kernels quantised while they are read: one layer at a time is there as numbers of the file, and no base ever."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
import numpy as np

from mora_jax.adapters.quantized import BLOCK, QuantizedKernel, block_scales, quantize, rows_per_block
from mora_jax.interop.layout import Entry
from mora_jax.interop.regions import Shardings, made_in_place, read_region
from mora_jax.interop.tensors import TensorFiles


def read_quantized(
    entry: Entry,
    kernel: QuantizedKernel,
    files: TensorFiles,
    stored_as: Mapping[str, str],
    shardings: Shardings | None,
) -> None:
    """Fills the codes and scales of a stacked kernel `[L, in, *out]`.

    Args:
        entry: the kernel and the tensors that make it up.
        kernel: of the entry.
        files: where they are.
        stored_as: names of tensors in files that differ from the entry's.
        shardings: where codes and scales lie; None: whole, on the default device.
    """
    for variable in (kernel.values, kernel.scales):
        make = partial(_region, entry, kernel, files, stored_as, variable is kernel.scales)
        shape = tuple(variable.shape)
        if shardings is None:
            variable.set_value(jnp.asarray(make(tuple(slice(0, size) for size in shape))))
        else:
            variable.set_value(made_in_place(shape, shardings(variable), make))


def _region(
    entry: Entry,
    kernel: QuantizedKernel,
    files: TensorFiles,
    stored_as: Mapping[str, str],
    scales: bool,
    index: tuple[slice, ...],
) -> np.ndarray:
    """`kernel.scales[index]` or `kernel.values[index]`: the blocks that it touches are read and quantised whole."""
    variable = kernel.scales if scales else kernel.values
    box = [range(size)[part] for part, size in zip(index, variable.shape, strict=True)]
    layers, rows = box[:2]
    height = 1 if scales else rows_per_block(kernel.format)
    first, last = rows.start // height, -(-rows.stop // height)
    inputs = slice(first * BLOCK, min(last * BLOCK, kernel.in_features))
    found = np.empty([len(part) for part in box], variable.dtype)
    for number, layer in enumerate(layers):
        part = read_region(entry, files, stored_as, (slice(layer, layer + 1), inputs, *index[2:]), np.float32)[0]
        whole = block_scales(part, kernel.format) if scales else quantize(part, kernel.format)[0]
        found[number] = whole[rows.start - first * height :][: len(rows)]
    return found
