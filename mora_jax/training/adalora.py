"""AdaLoRA in the training step: the penalty for its loss, and its allocation as a stage around the optimizer.

The state of the allocation is a part of the optimizer's state, so it is in every checkpoint, is sharded like the
arrays that it is about, and is carried through the one compiled step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from mora_jax.adapters.config import AdaLoRAConfig
from mora_jax.adapters.methods.adalora import (
    Importance,
    Masks,
    allocate,
    budget,
    existing,
    orthogonality,
    start_importance,
)
from mora_jax.adapters.sites import sites
from mora_jax.training.config.schema import AdapterConfig
from mora_jax.training.state import Arrays
from mora_jax.training.step import StepMetrics


class BudgetState(NamedTuple):
    """The optimizer's state and allocation's.

    Attributes:
        step: int32, updates done; one that is left out because it is not finite does not count.
        importance: what allocation remembers.
        inner: of the optimizer.
    """

    step: Array
    importance: Importance
    inner: Any


def reschedule(model: nnx.Module, section: AdapterConfig, steps: int) -> None:
    """Gives an AdaLoRA that a run starts from the run's own schedule; its mean rank at the end if none is asked for.

    Raises:
        ValueError: a schedule that can't be.
    """
    schedule = {name: getattr(section, name) for name in AdaLoRAConfig.training_settings()}
    changes = {name: value for name, value in schedule.items() if value is not None}
    for adapter in _adapters(model):
        adapter.config = replace(adapter.config, total_steps=steps, **changes)


def _adapters(model: nnx.Module) -> list[Any]:
    adapters = [place.adapter for place in sites(model)]
    return [adapter for adapter in adapters if adapter is not None and isinstance(adapter.config, AdaLoRAConfig)]


@dataclass(frozen=True)
class RankBudget:
    """The budget of one run.

    Attributes:
        config: the schedule, with the run's number of steps.
        exists: which triplets there are (see `mora_jax.adapters.methods.adalora.existing`).
    """

    config: AdaLoRAConfig
    exists: Masks

    @classmethod
    def of(cls, model: nnx.Module, adapters: Arrays, frozen: Arrays) -> RankBudget | None:
        """That of the AdaLoRA on a model with these arrays; None for other methods."""
        config = next((adapter.config for adapter in _adapters(model)), None)
        return None if config is None else cls(config, existing(adapters, frozen))

    def penalty(self, adapters: Arrays) -> Array:
        """What the loss gets for factors that are not orthogonal."""
        return self.config.orth_weight * orthogonality(adapters, self.exists)

    def mean_rank(self, step: int) -> float:
        """The mean rank that the budget allows after `step` steps."""
        matrices = sum(int(mask.any(-1).sum()) for mask in self.exists.values())
        return budget(self.config, self.exists, step) / matrices

    def row(self, step: int, metrics: StepMetrics) -> dict[str, float]:
        """What a row of metrics says of a step."""
        return {"penalty": float(metrics.penalty), "mean_rank": self.mean_rank(step)}

    def around(self, optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
        """The optimizer, followed by allocation.

        Importances are taken from the gradients of the loss, before any clipping, and from the updated weights.
        """

        def init(params: Any) -> BudgetState:
            return BudgetState(jnp.zeros((), jnp.int32), start_importance(params, self.exists), optimizer.init(params))

        def update(gradients: Any, state: Any, params: Any = None, **others: Any) -> tuple[Any, BudgetState]:
            updates, inner = optimizer.update(gradients, state.inner, params, **others)
            updated: Any = optax.apply_updates(params, updates)
            step = state.step + 1
            importance, masks = allocate(self.config, state.importance, updated, gradients, step, self.exists)
            # Adding the negative gives exactly 0; all other updates stay as they were, to the last bit.
            zeroing = {name: jnp.where(masks[name] == 0, -params[name], updates[name]) for name in self.exists}
            return updates | zeroing, BudgetState(step, importance, inner)

        return optax.GradientTransformationExtraArgs(init, update)
