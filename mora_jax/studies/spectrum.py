"""The singular values of what fine-tuning changed, matrix by matrix, in float64 on the host.

An adapter's change is its own update, so that no rounding of merged weights enters: such noise has full rank.

Intruder dimensions (arXiv 2410.21228) are leading singular vectors of tuned matrices that the base's don't resemble.
With W `[in, out]` before and W' after, the j-th output-side singular vector of W' is an intruder at ε where its largest
cosine with any of W, signs left out, is below ε. Scaling intruders by λ makes W' + (λ - 1) Σ σ_j u_j v_jᵀ of W': 1
leaves them, 0 takes them away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.sites import Site, sites
from mora_jax.adapters.targets import layer_number, matcher
from mora_jax.errors import InputError

EPSILONS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: The ε at which intruders are scaled, and the factors beside 1.
EPSILON = 0.5
FACTORS = (0.0, 0.5, 0.75)

ENERGY = 0.9
#: Numbers of singular values whose energy is recorded.
COUNTS = tuple(2**power for power in range(12))


@dataclass(frozen=True)
class Change:
    """What became of a matrix.

    Attributes:
        path: of its module, as in files.
        place, index: where its arrays lie in the model.
        base: the matrix as it was, float64 `[in, out]`.
        delta: what was added, float64 `[in, out]`.
    """

    path: str
    place: Site
    index: tuple[int, ...]
    base: np.ndarray
    delta: np.ndarray

    @property
    def module(self) -> str:
        """The last part of its name, such as `q_proj`."""
        return self.path.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The number of its layer."""
        return layer_number(self.path)

    @property
    def kind(self) -> str:
        """`MLP` or `attention`."""
        return "MLP" if "mlp" in self.path.split(".") else "attention"


def kernels(model: Any, every: int = 1) -> dict[str, np.ndarray]:
    """The matrices of layers on the host, `[in, out]` by path, in the dtype of the model; see `changes`."""
    return {path: _host(place.kernel(), index) for place, path, index in _matrices(model, every)}


def changes(model: Any, base: Mapping[str, np.ndarray] | None = None, every: int = 1) -> Iterator[Change]:
    """What became of each matrix of layers, the output head left out.

    Args:
        model: with adapters that only add to the kernel, or with trained kernels.
        base: the matrices as they were, by path (see `kernels`); needed where kernels are trained themselves.
        every: of so many layers, the first.

    Raises:
        InputError: an adapter that does more to a kernel than to add to it.
    """
    last, delta = None, None
    for place, path, index in _matrices(model, every):
        adapter = place.adapter
        if adapter is not None and (adapter.transforms or not adapter.only_adds):
            raise InputError(f"{place.title}: the spectrum of a change needs an adapter that only adds to the kernel")
        now = _host(place.kernel(), index).astype(np.float64)
        if adapter is None:
            before = now if base is None else base[path].astype(np.float64)
            yield Change(path, place, index, before, now - before)
            continue
        if place is not last:
            last, delta = place, adapter.delta_weight()
        yield Change(path, place, index, now, _host(delta, index).astype(np.float64))


def _matrices(model: Any, every: int) -> Iterator[tuple[Site, str, tuple[int, ...]]]:
    picks = matcher("all-linear")
    for place in sites(model):
        for number, path in enumerate(place.paths):
            if picks(path, place.is_linear) and (layer_number(path) or 0) % every == 0:
                yield place, path, place.index(number)


def _host(array: Any, index: tuple[int, ...]) -> np.ndarray:
    return np.asarray(jax.device_get(array[index]))


def cumulative_energy(values: np.ndarray) -> np.ndarray:
    """The share of the sum of squares in the first 1, 2, … singular values, which are in falling order.

    >>> cumulative_energy(np.array([4.0, 2.0, 1.0, 1.0])).round(4).tolist()
    [0.7273, 0.9091, 0.9545, 1.0]
    """
    squares = np.square(values)
    total = squares.sum()
    return np.cumsum(squares) / total if total else np.zeros_like(squares)


def energy_rank(values: np.ndarray, share: float = ENERGY) -> int:
    """How many singular values hold `share` of the sum of squares; 0 for a matrix of zeros.

    >>> energy_rank(np.array([4.0, 2.0, 1.0, 1.0]))
    2
    """
    energy = cumulative_energy(values)
    return int(np.argmax(energy >= share - 1e-12)) + 1 if energy.any() else 0


def stable_rank(values: np.ndarray) -> float:
    """The sum of squares over the largest square; 0 for a matrix of zeros.

    >>> stable_rank(np.array([4.0, 2.0, 1.0, 1.0]))
    1.375
    """
    squares = np.square(values)
    return float(squares.sum() / squares.max()) if squares.any() else 0.0


def gaussian_energy(shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The mean cumulative energy of matrices of independent normal numbers in these shapes, up to the least size."""
    rng = np.random.default_rng(0)
    least = min(min(shape) for shape in shapes)
    drawn = [cumulative_energy(np.linalg.svd(rng.normal(size=shape), compute_uv=False))[:least] for shape in shapes]
    return np.mean(drawn, axis=0)


@dataclass(frozen=True)
class Spectrum:
    """Of the changes of a model.

    Attributes:
        changes: of its matrices.
        values: the singular values of each, in falling order.
    """

    changes: tuple[Change, ...]
    values: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, matrices: Sequence[Change]) -> Spectrum:
        """Of these changes."""
        return cls(tuple(matrices), tuple(np.linalg.svd(one.delta, compute_uv=False) for one in matrices))

    def figures(self) -> dict[str, float]:
        """Means over matrices of `rank90` and `stable_rank`, by kind too, and `delta_norm`, Frobenius' norm of all."""
        ranks = [energy_rank(values) for values in self.values]
        by_kind: dict[str, list[int]] = {}
        for one, rank in zip(self.changes, ranks, strict=True):
            by_kind.setdefault(f"rank90_{one.kind}", []).append(rank)
        return {
            "rank90": float(np.mean(ranks)),
            "stable_rank": float(np.mean([stable_rank(values) for values in self.values])),
            "delta_norm": float(np.linalg.norm(np.concatenate(self.values))),
            **{name: float(np.mean(of_kind)) for name, of_kind in by_kind.items()},
        }

    def details(self, counts: Sequence[int], *, noise: bool = False) -> dict[str, float]:
        """`rank90` by module and layer, and the mean cumulative energy by kind in the first singular values.

        Args:
            counts: how many singular values.
            noise: also what that energy would be if matrices of these shapes held independent normal numbers.
        """
        figures: dict[str, float] = {}
        energies: dict[str, list[np.ndarray]] = {}
        for one, values in zip(self.changes, self.values, strict=True):
            figures[f"rank90_{one.module}_{one.layer}"] = energy_rank(values)
            energies.setdefault(f"energy_{one.kind}", []).append(cumulative_energy(values))
        if noise:
            for kind in {one.kind for one in self.changes}:
                shapes = [one.delta.shape for one in self.changes if one.kind == kind]
                energies[f"energy_noise_{kind}"] = [gaussian_energy(shapes)]
        for name, curves in energies.items():
            for count in counts:
                if count <= min(map(len, curves)):
                    figures[f"{name}_{count}"] = float(np.mean([curve[count - 1] for curve in curves]))
        return figures


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


def scaled(model: Any, leading: Sequence[Leading], below: float, factor: float) -> Any:
    """A model whose intruders at ε = `below` are scaled by `factor`; shares all other arrays with `model`.

    Args:
        model: with adapters, which stay beside their changed base matrices, or with trained kernels.
        leading: of the matrices of that model.
        below: ε.
        factor: λ.
    """
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(lambda array: array, state))  # variables of its own
    additions: Mapping[str, np.ndarray] = {one.change.path: one.scaling(below, factor) for one in leading}
    for place in sites(copy):
        known = [(number, path) for number, path in enumerate(place.paths) if path in additions]
        if known:
            kernel = np.array(place.kernel(), np.float32)
            for number, path in known:
                kernel[place.index(number)] += additions[path]
            place.put_kernel(jnp.asarray(kernel, place.dtype))
    return copy
