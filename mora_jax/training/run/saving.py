"""What a run leaves behind: checkpoints on its way, its result, and that of its best checkpoint."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax

from mora_jax.adapters.attach import partition
from mora_jax.adapters.merge import merge
from mora_jax.errors import InputError
from mora_jax.interop import load_pretrained, save_adapter, save_pretrained
from mora_jax.interop.fingerprint import arrays_hash, base_hash
from mora_jax.models.decoder import Decoder
from mora_jax.paths import found_path
from mora_jax.training.config.schema import Config, adapter_config
from mora_jax.training.hooks import Hook, Point, Row, Run
from mora_jax.training.relora import Restarter
from mora_jax.training.run.checkpoint import Checkpoints, read_trained
from mora_jax.training.run.directory import RunDirectory
from mora_jax.training.run.storage import with_retries
from mora_jax.training.setup import Setup, put_adapter
from mora_jax.training.state import Arrays, Structure, flat_arrays


def result_name(config: Config) -> str:
    """The folder of what a run is for: the adapter, or the model where its base is not that of old."""
    return "model" if config.adapter.config_class.changes_base else "adapter"


def save_result(run: Run, name: str, model: Callable[[], Decoder]) -> None:
    """Writes an adapter or a model into a folder of a run, in place of what a run that was killed may have left there.

    The disk not taking it, it is written again after a while; at last to a temporary folder, where no checkpoint holds
    the same.

    Args:
        run: one that writes nothing is left alone.
        name: of the folder.
        model: gives what is written, anew for each try; merged in place where the method has restarts.

    Raises:
        InputError: it could not be written to the run's folder.
    """
    directory, config, files = run.directory, run.config, run.directory.files
    if not directory.kept:
        return

    def write(out: Path) -> None:
        if not config.adapter.config_class.changes_base:
            save_adapter(model(), out, **_base(config), write=directory.writes)
            return
        trained = model()
        if run.assembly.restarts is not None:
            merge(trained)
        save_pretrained(trained, out, run.setup.tokenizer, overwrite=True, write=directory.writes)

    with files.folder(name, write=directory.writes) as out:

        def attempt() -> None:
            try:
                write(out)
            except InputError as error:
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

        if run.signals.several:
            write(out)  # each try gathers from all processes
            return
        try:
            with_retries(attempt, f"{out} can't be written", files.hint, files.note)
        except InputError as error:
            what = str(error).removesuffix(files.hint)
            if config.train.save_every or what == str(error):  # a checkpoint has the last step
                raise
            raise InputError(f"{what}{_rescued(write, out.name)}") from None


def _base(config: Config) -> dict[str, Any]:
    return {"base_model_name_or_path": found_path(config.model.path or ""), "overwrite": True}


def _rescued(write: Callable[[Path], None], name: str) -> str:
    """Writes a folder to where temporary files are; says what became of it."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="mora-jax-"))
        try:
            write(folder / name)
        except BaseException:
            folder.rmdir()
            raise
    except (OSError, InputError):
        lost = f"nor in {tempfile.gettempdir()}, so what was trained is lost"
        return f"{lost}: make room, and let train.save_every write checkpoints"
    return f"what was trained is in {folder / name}: make room, and move it there"


def export_checkpoint(run: str, step: int, out: Path) -> None:
    """Writes the adapter that one checkpoint of a run holds, as a run's end writes the last one.

    Args:
        run: its directory; the run may still be going on.
        step: after which the checkpoint was written.
        out: the folder.

    Raises:
        InputError: there is no such checkpoint, or the run trains the model itself.
    """
    directory = RunDirectory(run, writes=False)
    config = directory.read_config()
    if config.adapter.config_class.changes_base:
        raise InputError(
            f"{run} trains the model itself ({config.adapter.method}), so its checkpoints hold no adapter: end it with "
            f"mora-jax train --resume {run}, and give --model {run}/model"
        )
    trained = read_trained(directory.checkpoints, step)
    # As in training: some methods start from the base's exact numbers.
    how = {name: getattr(config.model, name) for name in ("dtype", "quantize")}
    model, _ = load_pretrained(config.model.path or "", **how)
    put_adapter(model, config, config.train.steps or step)
    graphdef, adapters, frozen = partition(model)
    shapes = {name: array.shape for name, array in flat_arrays(adapters).items()}
    if shapes != {name: array.shape for name, array in trained.items()}:
        raise InputError(f"{run}: the checkpoint of step {step} is not of the adapter that its config.json describes")
    model = Structure(graphdef, adapters, frozen).model(trained, flat_arrays(frozen))
    save_adapter(model, out, **_base(config))


def run_identity(setup: Setup, adapters: Arrays, restarts: Any = None) -> dict[str, Any]:
    """The identity of a run, as plain JSON values.

    Args:
        setup: the run.
        adapters: its trained arrays.
        restarts: of ReLoRA and ReMoRA.
    """
    section, folder = setup.config.adapter, getattr(setup.model, "folder", None)
    identity = {
        "base": arrays_hash(setup.model) if folder is None else base_hash(folder),
        "base_path": setup.config.model.path,
        "quantize": setup.config.model.quantize,
        "method": section.method,
        "rank": getattr(adapter_config(section), "rank", None),
        "targets": sorted({match.path for match in setup.attached.matches}),
        "arrays": {name: list(array.shape) for name, array in adapters.items()},
        "data": f"{setup.train.fingerprint()} in {setup.plan}",
        "evaluation": None if setup.evaluation is None else setup.evaluation.fingerprint(),
        "tasks": setup.task_rows,
    }
    if setup.config.loss.reference is not None:
        start = "the model without adapters" if setup.start is None else f"the model with its adapters ({setup.start})"
        identity["reference"] = f"{setup.config.loss.reference}, {start}"
    if setup.optimizer is not None:
        state = jax.eval_shape(setup.optimizer.init, adapters)
        identity["optimizer"] = {jax.tree_util.keystr(path): str(one) for path, one in jax.tree.leaves_with_path(state)}
    return identity if restarts is None else identity | {"restarts": f"{restarts}"}


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
        checkpoint = self._checkpoints.newest(
            runner.unreplicate(start.state), lambda step: self._base(step, start.frozen)
        )
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
            state, base = self._run.runner.unreplicate(point.state), self._base(point.step, point.frozen)
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
        return restarter.base(self._run.runner.unreplicate(frozen))

    def summary(self, point: Point) -> dict[str, Any]:
        """Writes what the best checkpoint gives, where it isn't the last."""
        best = self._checkpoints.best()
        if best is None:
            return {}
        run, (step, loss), name = self._run, best, result_name(self._run.config)
        if step != point.step:
            name, frozen = run.directory.best.name, run.runner.unreplicate(point.frozen)
            like, base = run.runner.unreplicate(point.state), self._base(step, point.frozen)
            checkpoint = self._checkpoints.restore(step, like, base)
            model = run.assembly.structure.model
            save_result(run, name, lambda: model(checkpoint.state.adapters, frozen | checkpoint.base))
        return {"best_step": step, "best_eval_loss": loss, "best": name}
