"""What the sum of weighted losses is divided by. A normaliser is one function and one entry in `NORMALIZERS`.

The denominator of a step is the sum of its rows' counts, over all micro-batches and devices. So any split of the same
rows gives the same loss.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mora_jax.data.weights import response_tokens

#: `(weights [T], segments [T], weight of the row)` -> the weights that the sum is made with, and the row's count.
Normalizer = Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, float]]


def _token(weights: np.ndarray, segments: np.ndarray, row: float) -> tuple[np.ndarray, float]:
    weighted = weights * np.float32(row)
    return weighted, float(weighted.sum(dtype=np.float64))


def _example(weights: np.ndarray, segments: np.ndarray, row: float) -> tuple[np.ndarray, float]:
    total = weights.sum(dtype=np.float64)
    return (weights * (row / total)).astype(np.float32), float(row)


def _response(weights: np.ndarray, segments: np.ndarray, row: float) -> tuple[np.ndarray, float]:
    return weights * np.float32(row), float(np.count_nonzero(weights[response_tokens(segments)]))


def _nonzero(weights: np.ndarray, segments: np.ndarray, row: float) -> tuple[np.ndarray, float]:
    return weights * np.float32(row), float(np.count_nonzero(weights))


def _constant(weights: np.ndarray, segments: np.ndarray, row: float) -> tuple[np.ndarray, float]:
    return weights * np.float32(row), 0.0  # The step divides by the constant itself.


NORMALIZERS: dict[str, Normalizer] = {
    "token": _token,
    "example": _example,
    "response": _response,
    "nonzero": _nonzero,
    "constant": _constant,
}


def normalize(
    weights: np.ndarray, segments: np.ndarray, row: float = 1.0, how: str = "token"
) -> tuple[np.ndarray, float]:
    """Prepares the weights of one example for a normaliser.

    Args:
      weights: `[T]` float32, the weight of predicting each token.
      segments: `[T]` values of `Segment`.
      row: what the whole example counts beside the others, at least 0.
      how: `token`: the sum of the weights; `example`: the number of examples, each with the mean over its own
        tokens; `response`: the number of response tokens, whatever the prompt's weight; `nonzero`: the number of
        tokens whose weight is not 0; `constant`: a number that the step is given.

    Returns:
      The weights of the sum, `[T]` float32, and what the example adds to the denominator.
    """
    if not weights.any() or row == 0:
        return np.zeros_like(weights), 0.0
    return NORMALIZERS[how](weights, segments, row)
