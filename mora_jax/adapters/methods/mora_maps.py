"""What the kinds of MoRA do to features on both sides of M: sums and repetitions with their transposes, rotations."""

from __future__ import annotations

import enum
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mora_jax.adapters.products.matmul import added, dot32, widened

KINDS = ("sharing", "rotation", "grouped", "grouped_tile", "strided_interleave", "decouple", "truncation")
SHARED = ("sharing", "grouped", "grouped_tile", "strided_interleave")  # kinds with one M for groups of both sides
STRIDED = ("sharing", "strided_interleave")
TILED = ("sharing", "grouped_tile")
BLOCK_KINDS = ("rotation", "decouple")


class Form(enum.Enum):
    """How a `CyclicMap` is computed: the same sums in another way."""

    SLICES = "slices of the features are put together and added"
    SPLIT = "the axis of features is split in two, for many pieces"
    MATRIX = "a product with a matrix of zeros and ones"

    @classmethod
    def of(cls, pieces: int, *, shared: bool, sharded: bool) -> Form:
        """The form for an axis of so many pieces.

        An axis that is split has XLA compute every index on CPUs, and move every number on TPUs, which tile an array's
        last two axes. Slices lie across devices where these share the features; a product does not mind.

        Args:
            pieces: that the axis consists of.
            shared: whether the pieces are summed or repeated: the matrix is narrow then.
            sharded: whether devices share the features of inputs or outputs.
        """
        if sharded:
            return cls.MATRIX if shared else cls.SPLIT
        return cls.SLICES if pieces <= _PIECES else cls.SPLIT


_PIECES = 256  # slices in one program are few enough to compile


class CyclicMap(NamedTuple):
    """Step f of `length` adds input `f mod source` to output `f mod target`: cyclic padding, tiles, strided sums."""

    length: int
    source: int
    target: int
    form: Form = Form.SPLIT

    def __call__(self, x: Array) -> Array:
        """`[N, source]` → `[N, target]`; wide from a product or where anything is summed, else in the dtype of `x`."""
        if self.form is not Form.SPLIT:
            return self._of_slices(x) if self.form is Form.SLICES else self._by_matrix(x)
        rows = len(x)
        rounds, rest = divmod(self.length, self.source)
        again = [jnp.tile(x, (1, rounds)) if rounds > 1 else x] * bool(rounds)
        x = jnp.concatenate([*again, x[:, :rest]], axis=1) if rest else again[0]
        rounds, rest = divmod(self.length, self.target)
        if rounds + bool(rest) == 1:  # nothing is summed
            return jnp.pad(x, ((0, 0), (0, self.target - self.length)))
        x = widened(x)
        sums = x[:, : rounds * self.target].reshape(rows, rounds, self.target).sum(1)
        return sums if not rest else jnp.concatenate([sums[:, :rest] + x[:, -rest:], sums[:, rest:]], axis=1)

    def _of_slices(self, x: Array) -> Array:
        rounds = []
        for start in range(0, self.length, self.target):
            stop = min(start + self.target, self.length)
            cuts = [start, *range(start - start % self.source + self.source, stop, self.source), stop]
            parts = [x[:, a % self.source :][:, : b - a] for a, b in itertools.pairwise(cuts)]
            rounds.append(jnp.pad(jnp.concatenate(parts, axis=1), ((0, 0), (0, start + self.target - stop))))
        return rounds[0] if len(rounds) == 1 else sum(map(widened, rounds[1:]), widened(rounds[0]))

    def _by_matrix(self, x: Array) -> Array:
        """With zeros and ones in the dtype of `x`; a number that a step reaches twice counts as 2."""
        few = min(self.source, self.target)
        rows, columns = (lax.broadcasted_iota(jnp.int32, (self.source, self.target), axis) for axis in (0, 1))
        many, one = (rows, columns) if self.target == few else (columns, rows)
        steps = [many + start for start in range(0, self.length, max(self.source, self.target))]
        return dot32(x, added(*(((step < self.length) & (step % few == one)).astype(x.dtype) for step in steps)))

    @property
    def transpose(self) -> CyclicMap:
        """The map of gradients."""
        return CyclicMap(self.length, self.target, self.source, self.form)


class GroupSums(NamedTuple):
    """Sums of contiguous groups, the first `features mod groups` of them one feature longer."""

    features: int
    groups: int

    def __call__(self, x: Array) -> Array:
        """`[N, features]` → wide `[N, groups]`."""
        size, longer = divmod(self.features, self.groups)
        x = widened(x)
        head = x[:, : longer * (size + 1)].reshape(len(x), longer, size + 1).sum(-1)
        tail = x[:, longer * (size + 1) :].reshape(len(x), self.groups - longer, size).sum(-1)
        return jnp.concatenate([head, tail], axis=-1)

    @property
    def transpose(self) -> Repeats:
        """The map of gradients."""
        return Repeats(self.features, self.groups)


class Repeats(NamedTuple):
    """Every entry repeated in place, the first `features mod groups` once more than the rest."""

    features: int
    groups: int

    def __call__(self, x: Array) -> Array:
        """`[N, groups]` → `[N, features]`."""
        size, longer = divmod(self.features, self.groups)
        head = jnp.repeat(x[:, :longer], size + 1, axis=-1)
        tail = jnp.repeat(x[:, longer:], size, axis=-1)
        return jnp.concatenate([head, tail], axis=-1)

    @property
    def transpose(self) -> GroupSums:
        """The map of gradients."""
        return GroupSums(self.features, self.groups)


Map = CyclicMap | GroupSums | Repeats


class FeatureMaps(NamedTuple):
    """What stands around M.

    Attributes:
        inner: from inputs to `blocks · q` features.
        outer: from as many to outputs.
        blocks: how often M is used, on as many blocks of features.
    """

    inner: Map
    outer: Map
    blocks: int

    @classmethod
    def of(cls, kind: str, in_features: int, out_features: int, q: int, *, sharded: bool = False) -> FeatureMaps:
        """Those of a kind whose M has the side q; `sharded` as in `Form.of`."""
        if kind == "truncation":
            return cls(
                CyclicMap(min(q, in_features), in_features, q), CyclicMap(min(q, out_features), q, out_features), 1
            )
        if kind in BLOCK_KINDS:
            blocks = used_blocks(in_features, out_features, q)
            size, form = blocks * q, Form.of(blocks, shared=False, sharded=sharded)
            return cls(
                CyclicMap(size, in_features, size, form), CyclicMap(out_features, size, out_features, form), blocks
            )
        return cls(compression(kind, in_features, q, sharded), decompression(kind, out_features, q, sharded), 1)


def compression(kind: str, in_features: int, q: int, sharded: bool = False) -> Map:
    """The sums of a kind in `SHARED`; `sharded` as in `Form.of`."""
    if kind not in STRIDED:
        return GroupSums(in_features, q)
    pieces = -(-in_features // q)
    return CyclicMap(pieces * q, in_features, q, Form.of(pieces, shared=True, sharded=sharded))


def decompression(kind: str, out_features: int, q: int, sharded: bool = False) -> Map:
    """The repetitions of a kind in `SHARED`; `sharded` as in `Form.of`."""
    if kind not in TILED:
        return Repeats(out_features, q)
    return CyclicMap(out_features, q, out_features, Form.of(-(-out_features // q), shared=True, sharded=sharded))


def used_blocks(in_features: int, out_features: int, q: int) -> int:
    """Blocks whose output is not cut off: with more inputs than outputs the later blocks have no effect."""
    return min(-(-in_features // q), -(-out_features // q))


def _angles(count: int, q: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of k · 10000^(−2j/q), `[count, q / 2]` in `dtype`."""
    theta = 10000.0 ** (-2.0 * np.arange(q // 2) / q)
    angle = np.arange(count)[:, None] * theta
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def rotated_features(z: Array) -> Array:
    """Rotates block k by k · θ, feature j paired with j + q/2. float32 `[N, count, q]`."""
    half = z.shape[-1] // 2
    cos, sin = _angles(z.shape[-2], z.shape[-1], z.dtype)
    first, second = z[..., :half], z[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotated_squares(m: Array, count: int) -> Array:
    """What block k is multiplied by, `(M R_k)ᵀ`, for each of `count` blocks: float32 `[q, q]` → `[count, q, q]`.

    A rotation of M for each block, `in · q` numbers once a step, in place of one of every token's blocks.
    """
    mt, half = m.T, m.shape[0] // 2
    cos, sin = (angles[:, :, None] for angles in _angles(count, m.shape[0], m.dtype))
    first, second = mt[:half], mt[half:]
    return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=1)
