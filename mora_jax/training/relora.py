"""Restarts of ReLoRA and ReMoRA: fold adapters into the base, reinitialise them, prune their moments, warm up again.

Lialin et al., 2023 (arXiv 2307.05695, algorithm 1 and section 3); ReMoRA: Jiang et al., 2024 (arXiv 2405.12130,
section 5.3). A restart is one compiled function between two steps; the step itself is never compiled again, since
shapes stay and even ReMoRA's kind is data.

The sum `W + ΔW` is taken in float32 and rounded once to the dtype in which the base is stored. With a bfloat16 base
(8 significant bits) a restart loses whatever of an update is smaller than half a step of the weight, about 0.2 % of
it: train in float32 (`model.dtype`) where that matters.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mora_jax.adapters.attach import partition
from mora_jax.adapters.sites import Site, adapted_sites
from mora_jax.training.state import Arrays, Structure, TrainState, flat_arrays, moments_on_device

_RESTART = 2**32 - 1  # folded into the key for fresh factors; steps fold in their own, smaller numbers


@dataclass(frozen=True)
class Restarts:
    """When a run restarts, and how.

    Attributes:
        every: steps between restarts.
        steps: the run's steps. There is no restart after the last: what is left is merged with the result.
        warmup: steps over which the learning rate rises again.
        prune: share of the moments that are set to zero.
    """

    every: int
    steps: int
    warmup: int
    prune: float

    @classmethod
    def of(cls, config: Any, steps: int) -> Restarts | None:
        """Those that an adapter configuration asks for, or None."""
        if not config.restarts:
            return None
        return cls(config.restart_every, steps, config.restart_warmup, config.prune)

    def due(self, done: int) -> bool:
        """Whether a restart follows the first `done` steps."""
        return done % self.every == 0 and 0 < done < self.steps

    def count(self, done: int) -> int:
        """How many restarts there have been when `done` steps are done."""
        return max(0, min(done, self.steps - 1)) // self.every

    def rewarm(self, schedule: optax.Schedule, first_warmup: int) -> optax.Schedule:
        """`schedule` that after each restart rises from zero again: jagged, a pure function of the step.

        In step k (from 0) after a restart the rate is (k + 1) / warmup of what `schedule` gives at the end of this
        warm-up, and from then on `schedule` itself. The run's own warm-up is left alone.

        Args:
            schedule: step from 0 → rate.
            first_warmup: steps of the run's own warm-up, which is part of `schedule`.
        """
        if self.warmup == 0:
            return schedule

        def jagged(step):
            since = step % self.every
            rising = (step >= self.every) & (step >= first_warmup) & (since < self.warmup)
            return jnp.where(rising, (since + 1) / self.warmup * schedule(step - since + self.warmup), schedule(step))

        return jagged


def largest(array: Array, share: float) -> Array:
    """Where entries are larger in magnitude than the quantile `share` of their matrix.

    A matrix is the last two axes; a stack of matrices has one more.
    """
    if share in (0, 1):
        return jnp.full(array.shape, share == 0)
    size = jnp.abs(array)
    threshold = jnp.quantile(size, share, axis=(-2, -1) if array.ndim > 2 else None, keepdims=True)
    return size > threshold


def prune_moments(optimizer_state: Any, arrays: Arrays, names: Iterable[str], share: float) -> Any:
    """Prunes an optax state's moments of some of the trained arrays; counts, and other arrays' moments, are kept.

    First and second moments are ranked each by its own magnitude, as in the authors' code, and a weight keeps both or
    none: A has no gradient in the first step after a restart, where B is zero, and a first moment without its second
    would be divided by Adam's epsilon alone. Moments in the host's memory, which computes nothing, come to the device.
    """
    chosen = frozenset(names)
    optimizer_state = moments_on_device(optimizer_state)

    def array_of(path, leaf):
        name = getattr(path[-1], "key", None) if path else None
        # Moments lie in dictionaries like that of the arrays themselves, however deep optax nests them.
        return name if name in chosen and leaf.shape == arrays[name].shape else None

    stays: dict[str, Array] = {}
    for path, leaf in jax.tree.leaves_with_path(optimizer_state):
        if name := array_of(path, leaf):
            stays[name] = stays.get(name, True) & largest(leaf, share)

    def pruned(path, leaf):
        name = array_of(path, leaf)
        return leaf if name is None else jnp.where(stays[name], leaf, 0)

    return jax.tree.map_with_path(pruned, optimizer_state)


def renewed(structure: Structure, adapters: Arrays, frozen: Arrays, key: Array) -> tuple[Arrays, Arrays]:
    """Folds every adapter into its base and reinitialises it; returns the trained and frozen arrays that changed.

    DoRA's magnitudes are reinitialised from the columns of the new base. Trained biases and modules that are trained
    whole have no low rank to overcome; they are left as they are.
    """
    model = structure.model(adapters, frozen)
    for number, place in enumerate(adapted_sites(model)):
        _renew(place, jax.random.fold_in(key, number))
    _, trained, rest = partition(model)
    return _changed(adapters, flat_arrays(trained)), _changed(frozen, flat_arrays(rest))


def _renew(place: Site, key: Array) -> None:
    adapter = place.adapter  # of a method with restarts, which has `renew`
    kernel = place.kernel()
    merged = adapter.merged(kernel)
    place.put_kernel(merged)
    adapter.renew(key)
    adapter.init_from_kernel(lambda: merged)


def _changed(before: Arrays, after: Arrays) -> Arrays:
    return {name: array for name, array in after.items() if array is not before[name]}


class Restarter:
    """Restarts a run; its one compiled function is made at the first restart.

    Args:
        structure: of the model.
        restarts: how.
        state, frozen: arrays as the run has them; only shapes are looked at.

    Attributes:
        names: the frozen arrays that restarts change, so that a checkpoint has to hold them.
        compile_seconds: what compiling took.
    """

    def __init__(self, structure: Structure, restarts: Restarts, state: TrainState, frozen: Arrays):
        self.restarts = restarts
        self.compile_seconds = 0.0
        self._compiled: Any = None
        names: dict[str, list[str]] = {}

        def look(adapters: Arrays, frozen: Arrays, key: Array) -> None:
            trained, rest = renewed(structure, adapters, frozen, key)
            names.update(trained=list(trained), frozen=list(rest))

        jax.eval_shape(look, state.adapters, frozen, state.key)
        self.names = tuple(names["frozen"])

        def restart(state: TrainState, changing: Arrays, staying: Arrays) -> tuple[TrainState, Arrays]:
            key = jax.random.fold_in(jax.random.fold_in(state.key, _RESTART), state.step)
            trained, rest = renewed(structure, state.adapters, staying | changing, key)
            moments = prune_moments(state.optimizer, state.adapters, names["trained"], restarts.prune)
            return state._replace(adapters=state.adapters | trained, optimizer=moments), rest

        self._restart = restart

    def base(self, frozen: Arrays) -> Arrays:
        """The frozen arrays that restarts change."""
        return {name: frozen[name] for name in self.names}

    def __call__(self, state: TrainState, frozen: Arrays) -> tuple[TrainState, Arrays]:
        """The state and the frozen arrays after a restart, each where it was. What changes is donated."""
        changing = self.base(frozen)
        staying = {name: array for name, array in frozen.items() if name not in changing}
        if self._compiled is None:
            start = time.perf_counter()
            places = jax.tree.map(lambda array: array.sharding, (state, changing))
            jitted = jax.jit(self._restart, donate_argnums=(0, 1), out_shardings=places)
            self._compiled = jitted.lower(state, changing, staying).compile()
            self.compile_seconds += time.perf_counter() - start
        state, changed = self._compiled(state, changing, staying)
        return state, staying | changed
