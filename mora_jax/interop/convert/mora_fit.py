"""MoRA's kinds as linear maps of M: their exact factors, and the M nearest to a given update.

Every kind turns M into an update by fixed linear maps. With N = Mᵀ and updates as Flax kernels `[in, out]`:

- `sharing`, `grouped`, `grouped_tile`, `strided_interleave` and `truncation`: ΔW = C N D with a compression C `[in, q]`
  and a decompression D `[q, out]`, so ΔW has at most rank q and `(C, N D)` is an exact LoRA. The N with the least
  ‖C N D − ΔW‖ is C⁺ ΔW D⁺.
- `rotation` and `decouple`: ΔW is block diagonal, block k being Q_k N with an orthogonal Q_k (the identity for
  `decouple`), and repeats when there are more outputs than blocks reach. Its rank is full. The nearest N is the mean of
  Q_kᵀ ΔW_k over the blocks, each output column with as many blocks and repetitions as show it.

A kind that leaves entries of M without effect gets zeros there. The equations are those of the paper (Jiang et al.,
2024, arXiv 2405.12130) with the authors' padding; the solutions are this project's.
"""

import numpy as np

from mora_jax.adapters.methods.mora import BLOCK_KINDS, STRIDED, TILED, contiguous_groups, square_rank

Array = np.ndarray


def exact_rank(in_features: int, out_features: int, rank: int, kind: str) -> int:
    """The rank that no update of this kind exceeds: that of the smallest LoRA which is exact for every M."""
    smaller = min(in_features, out_features)
    return smaller if kind in BLOCK_KINDS else min(smaller, square_rank(in_features, out_features, rank, kind))


def exact_factors(m: Array, in_features: int, out_features: int, kind: str) -> tuple[Array, Array] | None:
    """`a [in, q]` and `b [q, out]` with `a @ b` equal to the update of `m [q, q]`; None for the kinds of full rank.

    `a` holds small whole numbers, and `b` entries of `m`, so nothing is rounded.
    """
    if kind in BLOCK_KINDS:
        return None
    q = len(m)
    owners = _owners(out_features, q, kind)
    return _compression(in_features, q, kind), np.where(owners >= 0, m.T[:, owners], 0).astype(m.dtype)


def nearest_m(delta: Array, q: int, kind: str) -> Array:
    """The `m [q, q]` whose update comes nearest to `delta [in, out]` in the Frobenius norm, float32, or float64 as
    `delta`."""
    dtype, delta = np.result_type(np.float32, delta), np.asarray(delta, np.float64)
    nearest = _nearest_blocks(delta, q, kind) if kind in BLOCK_KINDS else _nearest_product(delta, q, kind)
    return np.ascontiguousarray(nearest.T, dtype)


def _owners(out_features: int, q: int, kind: str) -> Array:
    """Which entry of the q outputs of M each output shows, `[out]`; -1 for none."""
    outputs = np.arange(out_features)
    if kind == "truncation":
        return np.where(outputs < q, outputs, -1)
    return outputs % q if kind in TILED else contiguous_groups(out_features, q)


def _compression(in_features: int, q: int, kind: str) -> Array:
    """C as float32 `[in, q]`; whole numbers."""
    matrix = np.zeros((in_features, q), np.float32)
    if kind == "truncation":
        np.fill_diagonal(matrix, 1)
    elif kind in STRIDED:
        positions = np.arange(-(-in_features // q) * q)
        np.add.at(matrix, (positions % in_features, positions % q), 1)
    else:
        matrix[np.arange(in_features), contiguous_groups(in_features, q)] = 1
    return matrix


def _column_sums(delta: Array, owners: Array, q: int) -> tuple[Array, Array]:
    """Sums of the columns of each owner, `[in, q]`, and how many there are, `[q]`."""
    used = owners >= 0
    counts = np.bincount(owners[used], minlength=q)
    order = np.argsort(owners[used], kind="stable")
    present = np.flatnonzero(counts)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])[present]
    sums = np.zeros((len(delta), q))
    sums[:, present] = np.add.reduceat(delta[:, np.flatnonzero(used)[order]], starts, axis=1)
    return sums, counts


def _nearest_product(delta: Array, q: int, kind: str) -> Array:
    """C⁺ ΔW D⁺, `[q, q]`. Each output shows one entry, so D⁺ is a mean over the outputs that show the same one."""
    sums, counts = _column_sums(delta, _owners(delta.shape[1], q, kind), q)
    means = sums / np.maximum(counts, 1)
    compression = _compression(len(delta), q, kind).astype(np.float64)
    gram = compression.T @ compression
    grouped = compression.T @ means
    diagonal = np.diagonal(gram)
    if np.count_nonzero(gram) == np.count_nonzero(diagonal):
        # Every feature is in one group, so C⁺ is a mean as well.
        return np.divide(grouped, diagonal[:, None], out=np.zeros_like(grouped), where=diagonal[:, None] > 0)
    return np.linalg.pinv(gram, hermitian=True) @ grouped


def _nearest_blocks(delta: Array, q: int, kind: str) -> Array:
    in_features, out_features = delta.shape
    blocks = -(-in_features // q)
    outputs = np.arange(out_features) % (blocks * q)
    total, counts = np.zeros((q, q)), np.zeros(q)
    for k in range(min(blocks, -(-out_features // q))):
        rows = delta[(k * q + np.arange(q)) % in_features]
        sums, shown = _column_sums(rows, np.where(outputs // q == k, outputs % q, -1), q)
        total += _turned_back(sums, k) if kind == "rotation" else sums
        counts += shown
    nearest = total / np.maximum(counts, 1)
    # Where M is larger than the input, several of its inputs are the same feature and share what it asks for.
    copies = np.bincount(np.arange(q) % in_features, minlength=in_features)
    return nearest / copies[np.arange(q) % in_features][:, None] if q > in_features else nearest


def _turned_back(block: Array, k: int) -> Array:
    """Q_kᵀ `block [q, q]`: rows j and j + q/2 turned by −k · 10000^(−2j/q)."""
    half = len(block) // 2
    angle = k * 10000.0 ** (-2.0 * np.arange(half) / len(block))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = block[:half], block[half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])
