"""What `remat="dots"` keeps of a layer besides its input: the results of its projections and of its attention.

They are marked where they are made, rounded to the compute dtype. A policy that goes by operations would keep the
float32 sums inside a projection instead, the base product's and the adapter's each, which is more than `remat="none"`
keeps.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_NAME = "kept"
POLICY = jax.checkpoint_policies.save_only_these_names(_NAME)


def kept(arrays: Any) -> Any:
    """A pytree of arrays, marked; the same values."""
    return jax.tree.map(lambda array: checkpoint_name(array, _NAME), arrays)
