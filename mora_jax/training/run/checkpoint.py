"""Checkpoints of what training changes: adapters, optimizer state, step, key and counts of skipped updates.

Of the base model only what restarts have changed is written (see relora.py); otherwise it is on disk already.

A checkpoint belongs to a base, a method, a rank, layers and data: a restore into something else is refused.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mora_jax.errors import InputError
from mora_jax.paths import is_local, local_path
from mora_jax.training.run.storage import is_permanent, reason, silenced_loggers, storage_errors, with_retries
from mora_jax.training.state import Arrays, TrainState

# What a damaged checkpoint makes orbax and TensorStore raise.
_DAMAGE = (OSError, ValueError, KeyError, TypeError)


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: after which it was written.
        state: all of the state.
        base: frozen arrays that restarts have changed.
    """

    step: int
    state: TrainState
    base: Arrays


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run: the newest `keep` of them, and the best `keep_best`. A context manager.

    Each is written beside and renamed, so a killed run leaves whole checkpoints only.

    Args:
        directory: the folder that holds them, also on `gs://`.
        keep: how many of the newest are kept.
        identity: what a checkpoint belongs to (`check_identity`); a restore into something else is refused.
        keep_best: how many of those with the lowest evaluation loss are kept in addition.
        note: is told, in one line each, of what went wrong and was repaired.
    """

    def __init__(
        self,
        directory: Any,
        keep: int,
        identity: Mapping[str, Any],
        *,
        keep_best: int = 0,
        note: Callable[[str], None] = lambda text: None,
    ):
        self._directory = epath.Path(local_path(directory) if is_local(directory) else directory)
        self._policy = NewestAndBest(keep, keep_best)
        self._identity, self._note = dict(identity), note
        self._writing: Any = None
        self._reported = False  # whether a write has failed for good, which the caller knows
        # Orbax's threads report their errors themselves, with tracebacks; here they are told in one line.
        self._logger = logging.getLogger("absl")
        self._level = self._logger.level
        self._inner = self._open()
        if keep_best:
            for step in self.steps():
                self._policy.scored(step, self._metadata(step).get("eval_loss"))

    def _open(self) -> Any:
        self._logger.setLevel(logging.CRITICAL)

        def opened() -> Any:
            with silenced_loggers():
                return ocp.training.Checkpointer(
                    self._directory,
                    preservation_policy=self._policy,
                    save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                    cleanup_tmp_directories=True,
                )

        what = f"the checkpoints in {self._directory} can't be opened"
        return with_retries(opened, what, "fix the path or its permissions", self._note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # One error is enough: that of the run.
        with contextlib.suppress(*storage_errors() if error is not None else ()):
            self.close()

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, in order."""
        return [int(checkpoint.step) for checkpoint in self._inner.checkpoints]

    def is_best(self, eval_loss: float | None) -> bool:
        """Whether a state with this evaluation loss belongs to those to keep."""
        return self._policy.is_best(eval_loss)

    def scored(self, step: int, eval_loss: float | None) -> None:
        """Takes in the evaluation loss of a checkpoint that was written before it was evaluated."""
        if step in self.steps():
            self._policy.scored(step, eval_loss)

    def best(self) -> tuple[int, float] | None:
        """Step and evaluation loss of the best checkpoint, or None where none is kept for its loss."""
        self._settle()
        written = set(self.steps())
        scores = [(loss, step) for step, loss in self._policy.scores.items() if step in written]
        return None if not scores else min(scores)[::-1]

    def save(
        self, state: TrainState, base: Arrays | None = None, *, eval_loss: float | None = None, wait: bool = False
    ) -> None:
        """Writes the state, in the background, unless this step is written already.

        Where the write before turns out to have failed, this one is waited for, and tried again.

        Args:
            state: all of it.
            base: frozen arrays that are no longer those of the base model's folder.
            eval_loss: the evaluation loss of this state, where there is one.
            wait: until it is written; for a state after which nothing else is computed.

        Raises:
            InputError: it could not be written, with the cause. Checkpoints that were whole still are.
        """
        step = int(state.step)
        if step in self.steps():
            return
        plain = _plain(state, base)
        self._policy.scored(step, eval_loss)
        metadata = self._identity | {"step": step} | ({} if eval_loss is None else {"eval_loss": eval_loss})

        def write() -> Any:
            return self._inner.save_async(step, plain, force=True, custom_metadata=metadata)

        def write_now() -> None:
            self._drop_unfinished()
            with silenced_loggers():
                response = write()
                if response is not None:
                    response.result()
            if step not in self.steps():
                raise OSError(errno.EIO, "it was not there after it was written")

        try:
            self._finish_writing()
            if not wait:
                with silenced_loggers():
                    self._writing = write()
                return
        except storage_errors() as error:
            self._note(f"a checkpoint in {self._directory} was not written: {reason(error)}; writing step {step} now")
        what = f"the checkpoint of step {step} can't be written to {self._directory}"
        intact = f"the checkpoint of step {self.steps()[-1]} is whole; " if self.steps() else ""
        hint = f"{intact}fix that and continue with --resume {self._directory.parent}"
        # One of several processes can't try again alone.
        attempts = 4 if jax.process_count() == 1 else 1
        self._reported = True
        try:
            with_retries(write_now, what, hint, self._note, attempts=attempts)
        except InputError:
            self._drop_unfinished()
            raise
        self._reported = False

    def _drop_unfinished(self) -> None:
        """Gives back the room of a write that failed, so that the next may find it."""
        if jax.process_count() == 1:
            for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):  # a thread of that write may still be at it
                    path.rmtree(missing_ok=True)

    def _settle(self) -> None:
        """Waits for what is being written, where there is nothing to write in its place.

        Raises:
            InputError: it could not be written.
        """
        try:
            self._finish_writing()
        except storage_errors() as error:
            raise InputError(
                f"the last checkpoint can't be written to {self._directory}: {reason(error)}; those before are whole"
            ) from None

    def _finish_writing(self) -> None:
        response, self._writing = self._writing, None
        if response is not None:
            with silenced_loggers():
                response.result()

    def newest(self, like: TrainState, base_at: Callable[[int], Arrays]) -> Restored | None:
        """The newest whole checkpoint; newer ones that are damaged are moved aside, with a note about each.

        Args:
            like: gives shapes, dtypes and places.
            base_at: those of the changed base, by step.

        Returns:
            What it holds; None where there is no checkpoint.

        Raises:
            InputError: it belongs to another base, method, rank or set of layers; or all are damaged.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self.restore(step, like, base_at(step))
            except _Damaged as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged, step)
            return restored
        if damaged:
            raise self._none_readable(damaged)
        return None

    def _none_readable(self, damaged: Mapping[int, str]) -> InputError:
        """What to do where no checkpoint can be read: nothing that loses one, since all of them may be whole."""
        # The messages may name their own step, as a number of its own; the folder's path has digits too.
        a_step = re.compile(rf"(?<!\d)({'|'.join(map(str, damaged))})(?!\d)")
        if len({a_step.sub("STEP", why) for why in damaged.values()}) == 1:
            step, why = next(iter(damaged.items()))
            return InputError(
                f"no checkpoint in {self._directory} can be read, all for one reason (step {step}: {why}): they may be "
                "whole, so leave them there; see that path, permissions and installed versions are those of the run"
            )
        listed = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        return InputError(
            f"no checkpoint in {self._directory} can be read ({listed}); to start again from step 0, move that folder "
            f"to another place and use --resume {self._directory.parent}"
        )

    def restore(self, step: int, like: TrainState, base: Arrays | None = None) -> Restored:
        """One checkpoint's state and changed base, in the shapes, dtypes and places of `like` and `base`.

        Raises:
            InputError: it belongs to another base, method, rank or set of layers, or the storage can't be reached.
        """
        metadata = self._metadata(step)
        if "step" not in metadata:
            raise _Damaged("its metadata is missing or can't be read")
        check_identity(metadata, self._identity)
        abstract = jax.tree.map(_abstract, _plain(like, base))

        def load() -> dict[str, Any]:
            try:
                with silenced_loggers():
                    return self._inner.load(step, abstract_state=abstract)
            except _DAMAGE as error:
                if "UNAVAILABLE" in str(error) or isinstance(error, ConnectionError | TimeoutError):
                    raise
                raise _Damaged(reason(error)) from None

        what = f"the checkpoint of step {step} in {self._directory} can't be read"
        plain = with_retries(load, what, "see that the storage can be reached", self._note)
        key = jax.random.wrap_key_data(plain["key"], impl=jax.random.key_impl(like.key))
        changed = plain.pop("base", {})
        return Restored(step, TrainState(**{**plain, "key": key}), changed)

    def _metadata(self, step: int) -> dict[str, Any]:
        """What was written with a checkpoint; empty where it can't be read."""
        with silenced_loggers():
            try:
                return dict(self._inner.metadata(step).custom_metadata or {})
            except _DAMAGE as error:
                if is_permanent(error) and not isinstance(error, FileNotFoundError):
                    raise InputError(f"{self._directory} can't be read: {reason(error)}") from None
                return {}

    def _set_aside(self, damaged: Mapping[int, str], good: int) -> None:
        """Moves damaged checkpoints out of the way of the steps that are computed again."""
        if not damaged:
            return
        self.close()
        for step, why in damaged.items():
            target = self._directory / f"damaged-{step}"
            if jax.process_index() == 0:
                if target.exists():
                    target.rmtree()
                (self._directory / str(step)).rename(target)
            self._policy.scores.pop(step, None)
            self._note(
                f"the checkpoint of step {step} is damaged ({why}): kept as {target}; continuing from step {good}"
            )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are out of the way")
        self._inner = self._open()

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
            InputError: it could not be written.
        """
        try:
            self._settle()
        finally:
            self._logger.setLevel(self._level)
            with silenced_loggers(), contextlib.suppress(*storage_errors() if self._reported else ()):
                self._inner.close()


def read_trained(directory: Any, step: int) -> Arrays:
    """The trained arrays of one checkpoint, whatever devices it was written on; the run itself may go on meanwhile.

    Args:
        directory: the folder of a run's checkpoints, which is there.
        step: after which the checkpoint was written.

    Raises:
        InputError: there is no such checkpoint, or it can't be read.
    """
    with silenced_loggers(), ocp.training.Checkpointer(epath.Path(directory)) as reader:
        steps = [checkpoint.step for checkpoint in reader.checkpoints]
        if step not in steps:
            there = f"there are {', '.join(map(str, steps))}" if steps else "there is none yet"
            raise InputError(f"{directory} has no checkpoint of step {step}; {there}")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            abstract = jax.tree.map(functools.partial(_abstract, sharding=device), reader.metadata(step).metadata)
            return reader.load(step, abstract_state=abstract)["adapters"]
        except _DAMAGE as error:
            raise InputError(f"the checkpoint of step {step} in {directory} can't be read: {reason(error)}") from None


class _Damaged(Exception):
    """A checkpoint that is there and can't be read; says why."""


# In the order in which they are compared: what explains most comes first.
COMPARED = {
    "base": "base",
    "quantize": "model.quantize",
    "method": "adapter.method",
    "rank": "adapter.rank",
    "targets": "adapted layers",
    "arrays": "trained arrays",
    "reference": "the reference",
    "optimizer": "the optimizer's state",
    "data": "data",
    "evaluation": "evaluation data",
    "tasks": "evaluation tasks",
    "restarts": "restarts",
}


def check_identity(written: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compares a checkpoint's identity with a run's.

    Raises:
        InputError: they differ; one line with both values.
    """
    for name, title in COMPARED.items():
        # What a run did not have, it may have from now on.
        if written.get(name) is not None and written[name] != expected.get(name):
            theirs, ours = _value(name, written, expected), _value(name, expected, written)
            raise InputError(
                f"the checkpoint was written with {title} {theirs}, this run has {ours}; resume with the run's own "
                f"settings"
            )


def _value(name: str, identity: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """A value in words: of many only what the other doesn't have."""
    value, against = identity.get(name), other.get(name)
    if name == "base":
        return f"{identity.get('base_path')} ({value})"
    if isinstance(value, list) and isinstance(against, list):
        extra = ", ".join(sorted(set(value) - set(against))) or "none"
        return f"{extra} beside {len(set(value) & set(against))} others"
    if isinstance(value, dict) and isinstance(against, dict):
        differing = [key for key in sorted({*value, *against}) if value.get(key) != against.get(key)]
        return ", ".join(f"{key} {value.get(key, 'absent')}" for key in differing[:3])
    return repr(value)


def _plain(state: TrainState, base: Arrays | None) -> dict[str, Any]:
    """The state as arrays that any storage knows; a typed key becomes its bits."""
    plain = {**state._asdict(), "key": jax.random.key_data(state.key)}
    return plain | {"base": base} if base else plain


def _abstract(array: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding or array.sharding)


class NewestAndBest:
    """A preservation policy for orbax: the newest, and the best by evaluation losses, which may come after the writing.

    Attributes:
        scores: evaluation losses by step, of the best checkpoints.
    """

    def __init__(self, newest: int, best: int):
        self._newest, self._best = newest, best
        self.scores: dict[int, float] = {}

    def is_best(self, loss: float | None) -> bool:
        """Whether a state with this evaluation loss belongs to the best."""
        if not self._best or loss is None or not math.isfinite(loss):
            return False
        return len(self.scores) < self._best or loss < max(self.scores.values())

    def scored(self, step: int, loss: float | None) -> None:
        """Takes a score in, and drops those that are no longer among the best."""
        if loss is not None and self.is_best(loss):
            self.scores[step] = loss
            best = sorted(self.scores.items(), key=lambda item: (item[1], item[0]))[: self._best]
            self.scores = dict(best)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether each of the checkpoints, oldest first, stays."""
        first = len(checkpoints) - self._newest
        return [index >= first or info.step in self.scores for index, info in enumerate(checkpoints)]
