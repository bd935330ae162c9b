"""Arrays in this host's memory, wherever their parts lie."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def host(array: Any) -> np.ndarray:
    """The whole array in this host's memory.

    Where other processes hold parts that this one lacks, they are gathered: then all processes have to call this, for
    the same arrays in the same order.
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
