"""Tensors of MXFP4 checkpoints, read as the bfloat16 numbers that they stand for (GPT-OSS has its experts so).

The format is that of OCP's Microscaling Formats (MX) specification 1.0, 2023, sections 5 and 6: blocks of 32 numbers of
4 bits (a sign, two bits of exponent, one of mantissa) share a power of two. A file has for a kernel `[E, in, out]` the
bytes `_blocks`, uint8 `[E, out, in / 32, 16]`, of two numbers each, the lower half first, and the exponents `_scales`,
uint8 `[E, out, in / 32]`, counted from −127. Each number is exact in bfloat16.
"""

import ml_dtypes
import numpy as np

from mora_jax.errors import InputError
from mora_jax.interop.safetensors_io import TensorFiles

BLOCKS, SCALES = "_blocks", "_scales"
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Mxfp4Files(TensorFiles):
    """The tensors of a folder, pairs of blocks and scales as one dense tensor each.

    Raises:
        InputError: blocks without scales, or of other sizes.
    """

    def __init__(self, files: TensorFiles):
        self.folder, self._files = files.folder, files
        self.shapes = {name: shape for name, shape in files.shapes.items() if not name.endswith((BLOCKS, SCALES))}
        self._packed = {name.removesuffix(BLOCKS) for name in files.shapes if name.endswith(BLOCKS)}
        for name in self._packed:
            experts, outputs, blocks, width = (*files.shapes[name + BLOCKS], 0, 0, 0, 0)[:4]
            if width != 16 or files.shapes.get(name + SCALES) != (experts, outputs, blocks):
                raise InputError(f"{self.folder}: tensors {name}{BLOCKS} and {SCALES} are no kernel in MXFP4")
            self.shapes[name] = (experts, blocks * 32, outputs)

    def read(self, name: str) -> np.ndarray:
        if name not in self._packed:
            return self._files.read(name)
        kernel = np.empty(self.shapes[name], ml_dtypes.bfloat16)
        blocks, scales = self._files.read(name + BLOCKS), self._files.read(name + SCALES)
        for expert, (packed, exponents) in enumerate(zip(blocks, scales, strict=True)):
            numbers = np.stack([_VALUES[packed & 15], _VALUES[packed >> 4]], axis=-1)  # [out, in / 32, 16, 2]
            numbers = np.ldexp(numbers, exponents.astype(np.int32)[..., None, None] - 127)
            kernel[expert] = numbers.reshape(len(packed), -1).T
        return kernel

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.read(name)[index] if name in self._packed else self._files.read_part(name, index)
