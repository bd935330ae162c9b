"""Quantised frozen kernels: the format in memory, the way into it, and the way back for one product at a time.

A kernel `[in, *out]` is cut into blocks of 64 inputs, for each output by itself. A block keeps one float32 scale and a
code a number:

- `int8`: the scale is the largest magnitude / 127, and a number is its code times the scale: 8.5 bits a number.
- `nf4`: the scale is the largest magnitude, and codes name the 16 values of NormalFloat4, quantiles of the normal
  distribution (Dettmers et al., 2023, arXiv 2305.14314, section 3 and appendix E): 4.5 bits a number. The scales are
  not quantised once more. Two codes share a byte: byte j of a block holds input j in its low half and input j + 32 in
  its high half, so that the halves of a block lie in whole tiles of a TPU's memory.

Blocks lie along the input, so both formats are cut over devices like the kernel itself, block by block. Scales are
float32: as bfloat16 they would add an error of their own, up to 0.2 % of every number, to save 0.25 bits of it.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

FORMATS = ("int8", "nf4")
BLOCK = 64
#: The values that codes 0 to 15 of `nf4` stand for, from the paper's appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_DTYPES = {"int8": jnp.int8, "nf4": jnp.uint8}
#: Rows of `values` that hold one block.
ROWS_PER_BLOCK = {"int8": BLOCK, "nf4": BLOCK // 2}
_BORDERS = (np.array(NF4[1:], np.float32) + np.array(NF4[:-1], np.float32)) / 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A quantised kernel `[in, *out]`, or a stack of them `[L, in, *out]`.

    Attributes:
        values: codes, `int8 [*layers, 64 · blocks, *out]` or, of `nf4`, `uint8 [*layers, 32 · blocks, *out]`.
        scales: float32 `[*layers, blocks, *out]`.
        format: of `FORMATS`.
        in_features: inputs; less than 64 a block where the last is filled up.
    """

    values: Any
    scales: Any
    format: str = field(metadata={"static": True})
    in_features: int = field(metadata={"static": True})

    def dense(self, dtype: Any, out_axes: int) -> Array:
        """The kernel `[*layers, in, *out]` in `dtype`, a stack layer by layer; `out` has so many axes."""
        if self.values.ndim > 1 + out_axes:
            return jax.lax.map(lambda layer: layer.dense(dtype, out_axes), self)
        return self.after(()).astype(dtype)

    def after(self, waited_for: Any) -> Array:
        """The kernel `[in, *out]`, float32, not made before `waited_for` is there.

        A compiler would else make one for several products of a layer (of its forward pass, of its repetition, of its
        backward pass) and hold it from the first to the last.
        """
        blocks, *out = self.scales.shape
        # Matrices, as products take them: of axes that are short a TPU would move every code.
        flat = self.values.reshape(len(self.values), -1), self.scales.reshape(blocks, -1)
        values, scales, _ = jax.lax.optimization_barrier((*flat, waited_for))
        rows = values.reshape(blocks, -1, scales.shape[1])
        units = _nf4_units(rows) if self.format == "nf4" else rows.astype(jnp.float32)
        return (units * scales[:, None]).reshape(blocks * BLOCK, -1)[: self.in_features].reshape(-1, *out)


def _nf4_units(packed: Array) -> Array:
    """The values of `NF4` that `packed uint8 [blocks, 32, *out]` names, float32 `[blocks, 64, *out]`.

    A tree of choices by the bits of the codes: a table's rows would be gathered one by one on TPUs and CPUs.
    """
    blocks, half, *out = packed.shape
    # 1 for the low half of a byte, 16 for the high one; made in the program, where a constant would be carried around.
    first = 1 + 15 * jax.lax.broadcasted_iota(jnp.uint8, (1, 2, 1, *(1,) * len(out)), 1)
    level: list[Any] = [np.float32(value) for value in NF4]
    for bit in range(4):
        on = (packed[:, None] & (first * (1 << bit))) != 0
        level = [jnp.where(on, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0].reshape(blocks, 2 * half, *out)


def quantize(kernel: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a kernel, or whole blocks of its inputs: on the host, so that every backend gets the same numbers.

    Args:
        kernel: float32 `[in, *out]`; where it is a part of one, it starts with a block.
        format: of `FORMATS`.

    Returns:
        `values` and `scales`, as in `Quantized`. The nearest code is taken, of two the even one (`int8`) or the lower
        one (`nf4`). A block of zeros has scale 0. What is not finite makes its block's scale so.
    """
    largest = np.stack([np.abs(kernel[start : start + BLOCK]).max(0) for start in range(0, len(kernel), BLOCK)])
    scales = largest / np.float32(127) if format == "int8" else largest
    values = np.zeros((ROWS_PER_BLOCK[format] * len(scales), *kernel.shape[1:]), _DTYPES[format])
    for number, scale in enumerate(scales):
        rows = kernel[number * BLOCK : (number + 1) * BLOCK]
        start = number * ROWS_PER_BLOCK[format]
        with np.errstate(invalid="ignore", over="ignore"):
            units = rows / np.where(scale > 0, scale, np.float32(1))
            if format == "int8":
                codes = np.clip(np.rint(units), -127, 127).astype(np.int8)
                values[start : start + len(rows)] = codes
                continue
        codes = np.full((BLOCK, *kernel.shape[1:]), NF4.index(0.0), np.uint8)
        codes[: len(rows)] = 0
        for border in _BORDERS:
            codes[: len(rows)] += units > border
        values[start : start + BLOCK // 2] = codes[: BLOCK // 2] | codes[BLOCK // 2 :] << 4
    return values, scales


class QuantizedParam(nnx.Variable):
    """Codes or scales of a frozen kernel: nothing that could be trained, and not as many numbers as it stands for."""


class QuantizedKernel(nnx.Module):
    """Stands where a projection's kernel stands, and is read like one; zeros, for a loader to fill.

    Args:
        format: of `FORMATS`.
        shape: of the kernel, `[in, *out]` or `[L, in, *out]`.
        axes: logical names of `shape`; those of codes and scales too.
        out_axes: how many axes `out` has.
        dtype: what the kernel is read in.
    """

    def __init__(self, format: str, shape: tuple[int, ...], *, axes: tuple[str, ...], out_axes: int, dtype: Any):
        *stack, self.in_features = shape[: len(shape) - out_axes]
        out = shape[len(shape) - out_axes :]
        self.format, self.out_axes, self.dtype = format, out_axes, jnp.dtype(dtype)
        blocks = -(-self.in_features // BLOCK)  # the last may be filled up with zeros
        described: dict[str, Any] = {"axes": axes, "out_axes": out_axes}
        self.values = QuantizedParam(
            jnp.zeros((*stack, ROWS_PER_BLOCK[format] * blocks, *out), _DTYPES[format]), **described
        )
        self.scales = QuantizedParam(jnp.zeros((*stack, blocks, *out), jnp.float32), **described)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that it stands for."""
        shape = list(self.values.shape)
        shape[len(shape) - 1 - self.out_axes] = self.in_features
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of axes, those of layers in front included."""
        return self.values.ndim

    @property
    def size(self) -> int:
        """How many numbers the kernel has."""
        return math.prod(self.shape)

    def get_value(self) -> Quantized:
        """The pair that products take."""
        return Quantized(self.values.get_value(), self.scales.get_value(), self.format, self.in_features)

    def __getitem__(self, index: Any) -> Array:
        """The kernel itself, whole or in part."""
        return self.get_value().dense(self.dtype, self.out_axes)[index]


def packed_sizes(model: nnx.Module) -> dict[str, int]:
    """How many numbers of a kernel each array of quantised kernels stands for, by dotted path: scales for none."""
    sizes: dict[str, int] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, QuantizedKernel):
            name = ".".join(str(part) for part in path)
            sizes |= {f"{name}.values": node.size, f"{name}.scales": 0}
    return sizes


def quantized_format(model: nnx.Module) -> str | None:
    """The format of a model's kernels; None where they are not quantised."""
    formats = (node.format for _, node in nnx.iter_graph(model) if isinstance(node, QuantizedKernel))
    return next(formats, None)
