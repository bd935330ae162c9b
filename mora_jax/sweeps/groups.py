"""Which runs of a sweep can train together: those whose compiled step is the same but for numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mora_jax.sweeps.grid import SweepRun
from mora_jax.training.config.schema import Config, MeshConfig, OptimizerConfig

# What goes into the step as data, by section.
_OPTIMIZER = ("learning_rate", "schedule", "min_ratio", "warmup_steps", "weight_decay")
_LOSS = ("mode", "prompt_weight", "roles", "end_of_turn", "headers")


def stackable(config: Config) -> bool:
    """Whether a run can share a step with others: its base stays frozen, and its state on one device."""
    changes = config.adapter.config_class.changes_base
    alone = config.optimizer.offload or config.model.remat == "offload" or config.mesh != MeshConfig(data=1)
    return not changes and not alone


def shape_of(config: Config) -> Config:
    """What runs of one group have in common: the configuration without what is data in the step."""
    usual = OptimizerConfig()
    optimizer = {name: getattr(usual, name) for name in _OPTIMIZER}
    if config.optimizer.clip_norm is not None:
        optimizer["clip_norm"] = 1.0
    changes: dict[str, object] = {"out": None, "optimizer": dataclasses.replace(config.optimizer, **optimizer)}
    if not config.adapter.dropout:
        # Masks of dropout go by a token's place in the step: with it a batch has to be of the run's own length.
        loss = {name: getattr(type(config.loss)(), name) for name in _LOSS}
        if config.loss.normalize != "constant":
            loss["normalize"] = None
        changes["loss"] = dataclasses.replace(config.loss, **loss)
        changes["data"] = dataclasses.replace(config.data, train=None, eval=None)
    if not config.adapter.dropout or not (config.data.bucketing or config.data.eval_fraction):
        changes["seed"] = 0
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def groups_of(runs: Sequence[SweepRun], at_once: int | None = None) -> list[list[SweepRun]]:
    """The runs in groups that train together, in the order of their first ones; those of one base follow each other.

    Args:
        runs: of the sweep.
        at_once: the most runs of a group; None for no limit.
    """
    by_base: dict[object, dict[object, list[SweepRun]]] = {}
    for run in runs:
        shape = shape_of(run.config) if stackable(run.config) else run.name
        by_base.setdefault(run.config.model, {}).setdefault(shape, []).append(run)
    found = [group for groups in by_base.values() for group in groups.values()]
    size = at_once or len(runs)
    return [group[start : start + size] for group in found for start in range(0, len(group), size)]
