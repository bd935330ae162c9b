"""Tries meshes, micro-batches and remat, and names the fastest that fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from mora_jax.errors import InputError
from mora_jax.planning.plan import Plan, by_formula
from mora_jax.planning.topology import Topology
from mora_jax.training.config import Config, lay_over

_REMAT = ("none", "dots", "full")
_ROWS = (1, 2, 4, 8, 16)  # of a micro-batch, on the devices that share one row's place
#: Room that a plan by formula leaves before it is recommended: as much as the formula is off at most (docs/plan.md).
MARGIN = 0.85


def candidates(config: Config, topology: Topology) -> Iterator[Config]:
    """The ways to lay a run's batch over the chips: those whose rows come out even. The batch stays as it is, unless
    it has fewer rows than devices that share rows: then it is that many."""
    for data, fsdp, tensor in _meshes(topology.chips):
        sharing = data * fsdp
        batch = max(config.train.batch_size, sharing)
        for rows, remat in itertools.product(_ROWS, _REMAT):
            micro = sharing * rows
            if batch % micro:
                continue
            yield lay_over(
                config,
                [
                    ("mesh.data", data, "plan"),
                    ("mesh.fsdp", fsdp, "plan"),
                    ("mesh.tensor", tensor, "plan"),
                    ("train.batch_size", batch, "plan"),
                    ("train.micro_batch_size", micro, "plan"),
                    ("model.remat", remat, "plan"),
                ],
            )


def _meshes(chips: int) -> Iterator[tuple[int, int, int]]:
    """Meshes of all the chips: `tensor` up to 8, the rest in one of the other axes or half in each."""
    powers = [1 << i for i in range(chips.bit_length()) if chips % (1 << i) == 0]
    for tensor in (size for size in powers if size <= 8):
        rest = chips // tensor
        for fsdp in (size for size in powers if size <= rest):
            yield rest // fsdp, fsdp, tensor


def recommend(config: Config, values: dict[str, Any], topology: Topology) -> list[Plan]:
    """Every way that fits by formula with some room, the fastest first.

    Of ways that come within 2 % of each other the simpler one leads: fewer axes cut, then less remat, then fewer rows.
    """
    found = []
    for candidate in candidates(config, topology):
        try:
            plan = by_formula(candidate, values, topology)
        except InputError:
            continue
        if plan.needed <= MARGIN * topology.usable_bytes:
            found.append(plan)
    if not found:
        return []
    return sorted(found, key=_rank)


def _rank(plan: Plan) -> tuple[Any, ...]:
    middle = (plan.estimate.fastest + plan.estimate.slowest) / 2 / plan.tokens
    axes = sum(size > 1 for size in plan.mesh)
    # Two significant digits: what lies closer together than the formula can tell counts as equal.
    return float(f"{middle:.1e}"), axes, _REMAT.index(plan.config.model.remat), plan.micro_batch
