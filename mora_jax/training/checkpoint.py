"""Checkpoints of what training changes: adapters, optimizer state, step and key.

Of the base model only what restarts have changed is written (see restarts.py); otherwise it is on disk already.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mora_jax.errors import InputError
from mora_jax.training.state import Arrays, TrainState


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them. A context manager.

    Each is written beside and renamed, so a killed run leaves whole checkpoints only.

    Args:
        directory: the folder that holds them.
        keep: how many are kept.
        identity: what a checkpoint belongs to (method, shapes, base); a restore into something else is refused.
    """

    def __init__(self, directory: Path, keep: int, identity: dict[str, Any]):
        with _quiet():
            self._inner = ocp.training.Checkpointer(
                directory.absolute(),
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            )
        self._identity = identity

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, state: TrainState, base: Arrays | None = None) -> None:
        """Writes the state, in the background, unless this step is written already.

        Args:
            state: all of it.
            base: frozen arrays that are no longer those of the base model's folder.
        """
        step = int(state.step)
        with _quiet():
            if self._inner.latest is not None and self._inner.latest.step >= step:
                return
            self._inner.save_async(step, _plain(state, base), force=True, custom_metadata=self._identity)

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        latest = self._inner.latest
        return None if latest is None else int(latest.step)

    def restore(self, like: TrainState, base: Arrays | None = None) -> tuple[TrainState, Arrays]:
        """The newest checkpoint's state and changed base, in the shapes, dtypes and places of `like` and `base`.

        Raises:
            InputError: it belongs to another model, method or set of layers.
        """
        with _quiet():
            found = self._inner.metadata().custom_metadata or {}
            for name, value in self._identity.items():
                if name in found and found[name] != value:
                    raise InputError(
                        f"the checkpoint was written with {name} {found[name]!r}, this run has {value!r}; "
                        f"resume with the run's own settings"
                    )
            plain = self._inner.load(abstract_state=jax.tree.map(_abstract, _plain(like, base)))
        key = jax.random.wrap_key_data(plain["key"], impl=jax.random.key_impl(like.key))
        base = plain.pop("base", {})
        return TrainState(**{**plain, "key": key}), base

    def close(self) -> None:
        """Waits for what is being written."""
        with _quiet():
            self._inner.close()


def _plain(state: TrainState, base: Arrays | None) -> dict[str, Any]:
    """The state as arrays that any storage knows; a typed key becomes its bits."""
    plain = {**state._asdict(), "key": jax.random.key_data(state.key)}
    return plain | {"base": base} if base else plain


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax reports every file through absl's logger; a run's stderr is for the run."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
