"""What a run leaves behind: checkpoints on its way, its result, and that of its best checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from mora_jax.models.decoder import Decoder
from mora_jax.training.hooks import Hook, Point, Row, Run
from mora_jax.training.relora import Restarter
from mora_jax.training.run.checkpoint import Checkpoints
from mora_jax.training.run.export import result_name, write_result, write_with_retries
from mora_jax.training.run.identity import run_identity
from mora_jax.training.state import Arrays


def save_result(run: Run, name: str, model: Callable[[], Decoder]) -> None:
    """Writes an adapter or a model into a folder of a run; `model` gives what is written, anew for each try."""
    directory, config = run.directory, run.config
    if not directory.kept:
        return

    def write_to(out: Path) -> None:
        restarted = run.assembly.restarts is not None
        write_result(model(), out, config, run.setup.tokenizer, restarted=restarted, write=directory.writes)

    with directory.files.folder(name, write=directory.writes) as out:
        if run.signals.several:
            write_to(out)  # each try gathers from all processes
        else:
            saved = config.train.save_every > 0  # a checkpoint has the last step
            write_with_retries(write_to, out, directory.files, rescue=not saved)


class CheckpointHook(Hook):
    """Writes checkpoints: every `train.save_every` steps, after a signal, and of the states that score best.

    Args:
        run: whose directory is kept.
        restarter: changes the base of runs with restarts; None without.
    """

    _checkpoints: Checkpoints

    def __init__(self, run: Run, restarter: Restarter | None):
        self._run, self._restarter = run, restarter

    def __enter__(self) -> Self:
        run, settings = self._run, self._run.config.train
        identity = run_identity(run.setup, run.assembly.adapters, run.assembly.restarts)
        best = settings.keep_best if run.setup.evaluation is not None else 0
        if run.directory.writes and not run.directory.files.remote:
            run.directory.checkpoints.mkdir(parents=True, exist_ok=True)
        folder, note = run.directory.checkpoints, run.display.note
        self._checkpoints = Checkpoints(folder, settings.keep, identity, keep_best=best, note=note)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._checkpoints.__exit__(*exception)

    def restored(self, start: Point) -> Point:
        """Where the run goes on: at its newest checkpoint, or at `start` where there is none."""
        runner = self._run.runner
        checkpoint = self._checkpoints.newest(runner.whole(start.state), lambda step: self._base(step, start.frozen))
        if checkpoint is None:
            return start
        state, base = runner.place(checkpoint.state), runner.place(checkpoint.base)
        return Point(checkpoint.step, state, start.frozen | base)

    def remember(self, row: Row) -> None:
        self._checkpoints.scored(row["step"], row.get("eval_loss"))  # of one that was written before it was scored

    on_evaluation = remember

    def due(self, step: int, last: bool) -> bool:
        every = self._run.config.train.save_every
        return bool(every) and (last or step % every == 0)

    def on_pause(self, point: Point) -> Point:
        eval_loss = None if point.evaluation is None else point.evaluation.get("eval_loss")
        stops = self._run.signals.received is not None
        due = self.due(point.step, point.last) or (stops and not point.over)
        if due or self._checkpoints.is_best(eval_loss):
            state, base = self._run.runner.whole(point.state), self._base(point.step, point.frozen)
            self._run.directory.files.flush()  # a checkpoint has all rows of its steps
            self._checkpoints.save(state, base, eval_loss=eval_loss, wait=point.last or stops)
        return point

    def _base(self, step: int, frozen: Arrays) -> Arrays:
        """The frozen arrays that restarts have changed in the first `step` steps.

        None before the first restart, except where the best checkpoint may have to bring back what was then.
        """
        restarter = self._restarter
        if restarter is None or not (self._run.config.train.keep_best or restarter.restarts.count(step)):
            return {}
        return restarter.base(self._run.runner.whole(frozen))

    def summary(self, point: Point) -> dict[str, Any]:
        """Writes what the best checkpoint gives, where it isn't the last."""
        best = self._checkpoints.best()
        if best is None:
            return {}
        run, (step, loss), name = self._run, best, result_name(self._run.config)
        if step != point.step:
            name, frozen = run.directory.best.name, run.runner.whole(point.frozen)
            like, base = run.runner.whole(point.state), self._base(step, point.frozen)
            checkpoint = self._checkpoints.restore(step, like, base)
            model = run.assembly.structure.model
            save_result(run, name, lambda: model(checkpoint.state.adapters, frozen | checkpoint.base))
        return {"best_step": step, "best_eval_loss": loss, "best": name}
