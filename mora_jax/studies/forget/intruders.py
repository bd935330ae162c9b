"""Intruder dimensions (arXiv 2410.21228): leading singular vectors of tuned matrices that the base's don't resemble.

With W `[in, out]` before and W' after, the j-th output-side singular vector of W' is an intruder at ε where its largest
cosine with any of W, signs left out, is below ε. Scaling intruders by λ makes W' + (λ - 1) Σ σ_j u_j v_jᵀ of W': 1
leaves them, 0 takes them away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.sites import sites
from mora_jax.studies.forget.spectrum import Change

EPSILONS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: The ε at which intruders are scaled, and the factors beside 1.
EPSILON = 0.5
FACTORS = (0.0, 0.5, 0.75)


@dataclass(frozen=True)
class Leading:
    """The leading singular triples of a tuned matrix.

    Attributes:
        change: of the matrix.
        inputs: `[in, top]`, singular vectors on the side of the inputs.
        values: `[top]`, singular values, in falling order.
        outputs: `[top, out]`, singular vectors on the side of the outputs.
        nearest: `[top]`, the largest cosine of each of `outputs` with one of the base's, signs left out.
    """

    change: Change
    inputs: np.ndarray
    values: np.ndarray
    outputs: np.ndarray
    nearest: np.ndarray

    @classmethod
    def of(cls, change: Change, top: int, base: np.ndarray | None = None) -> Leading:
        """Of a change.

        Args:
            change: of a matrix.
            top: how many singular vectors; all, where there are fewer.
            base: the base's, `[n, out]`, where they are known (see `output_side`).
        """
        inputs, values, outputs = np.linalg.svd(change.base + change.delta, full_matrices=False)
        nearest = np.abs(outputs[:top] @ (output_side(change.base) if base is None else base).T).max(axis=1)
        return cls(change, inputs[:, :top], values[:top], outputs[:top], nearest)

    def count(self, below: float) -> int:
        """How many intruders there are at ε = `below`."""
        return int((self.nearest < below).sum())

    def scaling(self, below: float, factor: float) -> np.ndarray:
        """What scaling the intruders at ε = `below` by `factor` adds to the matrix, `[in, out]`."""
        chosen = self.nearest < below
        return (factor - 1) * (self.inputs[:, chosen] * self.values[chosen]) @ self.outputs[chosen]


def output_side(matrix: np.ndarray) -> np.ndarray:
    """The singular vectors of a matrix `[in, out]` on the side of the outputs, `[min(in, out), out]`."""
    return np.linalg.svd(matrix, full_matrices=False)[2]


def scaled(model: Any, found: Sequence[Leading], below: float, factor: float) -> Any:
    """A model whose intruders at ε = `below` are scaled by `factor`; shares all other arrays with `model`.

    Args:
        model: with adapters, which stay beside their changed base matrices, or with trained kernels.
        found: of the matrices of that model.
        below: ε.
        factor: λ.
    """
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(lambda array: array, state))  # variables of its own
    additions: Mapping[str, np.ndarray] = {one.change.path: one.scaling(below, factor) for one in found}
    for place in sites(copy):
        known = [(number, path) for number, path in enumerate(place.paths) if path in additions]
        if not known:
            continue
        kernel = np.array(place.kernel(), np.float32)
        for number, path in known:
            kernel[place.index(number)] += additions[path]
        place.put_kernel(jnp.asarray(kernel, place.dtype))
    return copy
