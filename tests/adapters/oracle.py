"""Dense matrices of MoRA's kinds, written from their definitions with plain loops and float64."""

import math

import numpy as np


def groups_contiguous(features: int, q: int) -> list[int]:
    """The group of each feature: `features mod q` groups have one more than `features // q`."""
    size, longer = divmod(features, q)
    owners = []
    for group in range(q):
        owners += [group] * (size + 1 if group < longer else size)
    return owners


def compress_strided(features: int, q: int) -> np.ndarray:
    """`[q, in]`: position p of the cyclically padded input is feature p mod in and belongs to group p mod q."""
    matrix = np.zeros((q, features))
    padded = math.ceil(features / q) * q
    for p in range(padded):
        matrix[p % q, p % features] += 1
    return matrix


def compress_contiguous(features: int, q: int) -> np.ndarray:
    matrix = np.zeros((q, features))
    for feature, group in enumerate(groups_contiguous(features, q)):
        matrix[group, feature] = 1
    return matrix


def decompress_tiled(features: int, q: int) -> np.ndarray:
    matrix = np.zeros((features, q))
    for p in range(features):
        matrix[p, p % q] = 1
    return matrix


def decompress_interleaved(features: int, q: int) -> np.ndarray:
    return compress_contiguous(features, q).T


def rotation(q: int, k: int) -> np.ndarray:
    """`[q, q]`: turns the pair (j, j + q/2) by k · 10000^(−2j/q)."""
    matrix = np.eye(q)
    half = q // 2
    for j in range(half):
        angle = k * 10000.0 ** (-2.0 * j / q)
        matrix[j, j] = matrix[j + half, j + half] = math.cos(angle)
        matrix[j, j + half] = -math.sin(angle)
        matrix[j + half, j] = math.sin(angle)
    return matrix


def dense(m: np.ndarray, in_features: int, out_features: int, kind: str) -> np.ndarray:
    """The update as torch lays it out, `[out, in]`."""
    m = np.asarray(m, np.float64)
    q = len(m)
    if kind == "truncation":
        matrix = np.zeros((out_features, in_features))
        for p in range(min(q, out_features)):
            for j in range(min(q, in_features)):
                matrix[p, j] = m[p, j]
        return matrix
    if kind in ("rotation", "decouple"):
        blocks = math.ceil(in_features / q)
        whole = np.zeros((blocks * q, in_features))
        for k in range(blocks):
            turned = m @ rotation(q, k if kind == "rotation" else 0)
            for row in range(q):
                for column in range(q):
                    whole[k * q + row, (k * q + column) % in_features] += turned[row, column]
        return np.stack([whole[p % (blocks * q)] for p in range(out_features)])
    compress = compress_strided if kind in ("sharing", "strided_interleave") else compress_contiguous
    decompress = decompress_tiled if kind in ("sharing", "grouped_tile") else decompress_interleaved
    return decompress(out_features, q) @ m @ compress(in_features, q)
