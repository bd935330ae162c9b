"""What PEFT's VERA and RANDLORA share: a pair of arrays for all targets, in the file or drawn from its seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.sites import Site
from mora_jax.errors import InputError
from mora_jax.interop.peft.format import Format, first_of
from mora_jax.interop.safetensors_io import TensorFiles


class SharedBasesFormat(Format):
    """A type with such a pair.

    Attributes:
        rank_axes: the axis of the rank, of each of the pair.
    """

    rank_axes: ClassVar[tuple[int, int]]

    def drawn(self, values: dict[str, Any], widths: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The pair that PEFT draws for layers of these widths, as files have it."""
        raise NotImplementedError  # abstract: each type's file defines it

    def least(self, rank: int, found: list[Site]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest shapes that do for the places of the targets."""
        raise NotImplementedError  # abstract: each type's file defines it

    def shared(
        self, values: dict[str, Any], names: Mapping[str, str], files: TensorFiles, found: list[Site]
    ) -> dict[str, np.ndarray]:
        if not values.get("save_projection", True):
            if names:
                raise InputError(
                    f"{files.folder}: save_projection is false, but there is {first_of(names)}, which PEFT would leave "
                    "unread and redraw: set save_projection to true if the tensors are the ones to use"
                )
            return dict(zip(self.shared_names, self.drawn(values, widest(found)), strict=True))
        absent = [name for name in self.shared_names if name not in names]
        if absent:
            raise InputError(f"{files.folder}: save_projection is true, but {' and '.join(absent)} are missing")
        arrays, rank = {}, self.configured(values, "any").rank
        for name, wanted, axis in zip(self.shared_names, self.least(rank, found), self.rank_axes, strict=True):
            shape = files.shapes[names[name]]
            large = len(shape) == len(wanted) and all(size >= low for size, low in zip(shape, wanted, strict=True))
            if not large or shape[axis] != rank:
                raise InputError(
                    f"{files.folder}: tensor {names[name]} has shape {list(shape)}, but it must be at least "
                    f"{list(wanted)}, of rank {rank}"
                )
            arrays[name] = files.read(names[name]).astype(np.float32)
        return arrays


def widest(found: list[Site]) -> tuple[int, int]:
    """The most inputs and outputs."""
    return max(place.in_features for place in found), max(place.out_features for place in found)
