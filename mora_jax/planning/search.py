"""Tries meshes, micro-batches and remat, where nothing fits a quantised base too, and names the fastest that fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from mora_jax.errors import InputError
from mora_jax.models.decoder import REMAT
from mora_jax.planning.plan import Plan, by_formula
from mora_jax.planning.topology import Topology
from mora_jax.training.config.load import check_quantize
from mora_jax.training.config.schema import QUANTIZE, Config, lay_over
from mora_jax.training.sharding.mesh import AXES

#: What is tried first, and where nothing of it fits: the layers' inputs on the host, rows split along their length.
_REMAT, _LAST_REMAT = ("none", "dots", "full"), ("full", "offload")
_ROWS = (1, 2, 4, 8, 16)  # of a micro-batch, on the devices that share one row's place
#: Room that a plan by formula leaves before it is recommended: as much as the formula is off at most (docs/plan.md).
MARGIN = 0.8


def formats(config: Config) -> list[str]:
    """How the base may be held, in the order in which it is tried: each only where nothing fits with those before."""
    first = QUANTIZE.index(config.model.quantize)
    return [held for held in QUANTIZE[first:] if held == config.model.quantize or _can_hold(config, held)]


def _can_hold(config: Config, held: str) -> bool:
    try:
        check_quantize(lay_over(config, [("model.quantize", held, "plan")]))
    except InputError:
        return False
    return True


def candidates(config: Config, topology: Topology, *, last: bool = False) -> Iterator[Config]:
    """The ways to lay a run's batch over the chips: those whose rows come out even. The batch stays as it is, unless
    it has fewer rows than devices that share rows: then it is that many.

    Args:
        config: of the run.
        topology: the chips.
        last: whether to try what costs more than it saves unless nothing else fits.
    """
    for data, fsdp, tensor, context in _meshes(topology.chips, long_rows=last):
        sharing = data * fsdp
        batch = max(config.train.batch_size, sharing)
        for rows, remat in itertools.product(_ROWS, _LAST_REMAT if last else _REMAT):
            micro = sharing * rows
            if batch % micro:
                continue
            settings = dict(zip((f"mesh.{axis}" for axis in AXES), (data, fsdp, tensor, context), strict=True))
            settings |= {"train.batch_size": batch, "train.micro_batch_size": micro}
            named = [(name, value, "plan") for name, value in settings.items()]
            yield lay_over(config, [*named, ("model.remat", remat, "plan")])


def _meshes(chips: int, *, long_rows: bool) -> Iterator[tuple[int, int, int, int]]:
    """Meshes of all the chips, every axis a power of two, `tensor` up to 8, and no `context` but for long rows."""
    powers = [1 << i for i in range(chips.bit_length()) if chips % (1 << i) == 0]
    for context in powers if long_rows else [1]:
        for tensor in (size for size in powers if size <= 8 and chips % (size * context) == 0):
            rest = chips // tensor // context
            for fsdp in (size for size in powers if size <= rest):
                yield rest // fsdp, fsdp, tensor, context


def recommend(config: Config, values: dict[str, Any], topology: Topology) -> list[Plan]:
    """Every way that fits by formula with some room, the fastest first.

    A base in fewer bits than was asked for is looked at only where nothing else fits: `int8` first, then `nf4`.
    Of ways that come out alike to two digits the simpler one leads: fewer sharded axes, less remat, fewer rows.
    """
    for held, last in itertools.product(formats(config), (False, True)):
        found = []
        for candidate in candidates(lay_over(config, [("model.quantize", held, "plan")]), topology, last=last):
            try:
                plan = by_formula(candidate, values, topology)
            except InputError:
                continue
            if plan.needed <= MARGIN * topology.usable_bytes:
                found.append(plan)
        if found:
            return sorted(found, key=_rank)
    return []


def _rank(plan: Plan) -> tuple[Any, ...]:
    middle = (plan.estimate.fastest + plan.estimate.slowest) / 2 / plan.tokens
    axes = sum(size > 1 for size in plan.mesh)
    # Two significant digits: figures closer together than the formula can tell counts as equal.
    return float(f"{middle:.1e}"), axes, REMAT.index(plan.config.model.remat), plan.config.train.micro_batch
