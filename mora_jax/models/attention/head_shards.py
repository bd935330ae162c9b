"""How attention is shared among devices by rows and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


@dataclass(frozen=True)
class HeadShards:
    """How the arrays of attention are sharded: by rows and by key/value heads. Hashable, for a compiled function's key.

    Attributes:
        mesh: the devices.
        rows: the mesh axes of rows; () where every device computes all of them.
        heads: the mesh axis of key/value heads; None where every device computes all of them.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    heads: str | None

    def mapped(self, function: Any, kinds: str, results: str) -> Any:
        """`function` on each device's share, its results as a tuple. Kinds: `q` `[R, G, N, t, H]`, `k` `[R, G, t, H]`,
        `r` `[R, G, N, t]`, `s` `[R, t]`, `w` a scalar."""
        specs = {
            "q": PartitionSpec(self.rows, self.heads),
            "k": PartitionSpec(self.rows, self.heads),
            "r": PartitionSpec(self.rows, self.heads),
            "s": PartitionSpec(self.rows),
            "w": PartitionSpec(),
        }
        into = tuple(specs[kind] for kind in kinds)
        out = tuple(specs[kind] for kind in results)
        return jax.shard_map(function, mesh=self.mesh, in_specs=into, out_specs=out, check_vma=False)
