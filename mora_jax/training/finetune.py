"""Fine-tuning from Python: the loop of `mora-jax train` on a model and rows that a program has."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx

from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.base import FullParam
from mora_jax.adapters.config import FullConfig
from mora_jax.adapters.merge import merge
from mora_jax.data.read.locate import NAME, memory_rows
from mora_jax.display.figures import new_figure, write_figure
from mora_jax.errors import InputError
from mora_jax.interop import save_adapter, save_pretrained
from mora_jax.losses.preference import OBJECTIVES
from mora_jax.models.decoder import Decoder
from mora_jax.paths import OFF
from mora_jax.training.config.load import check_together
from mora_jax.training.config.schema import Config, adapter_settings, lay_over
from mora_jax.training.display import Display, make_display
from mora_jax.training.loop import Trainer, new_run
from mora_jax.training.run.directory import RunDirectory
from mora_jax.training.run.publish import model_card, upload
from mora_jax.training.setup import InMemory
from mora_jax.training.update_rules import OBJECT

#: Stands for a model in memory where a path would.
MODEL = "a model in memory"


@dataclass
class FinetuneResult:
    """What `finetune` gives back.

    Attributes:
        model: with the trained adapters on it (merged after ReLoRA and ReMoRA), or fully fine-tuned.
        tokenizer: of the model.
        metrics: the rows of `metrics.jsonl`, one dictionary a logged step or evaluation: `pandas.DataFrame(metrics)`.
        summary: what `summary.json` holds; empty after an interrupt.
        interrupted: whether the run was stopped by a signal before its last step.
        out: the run directory; None where nothing was written.
        config: the whole configuration.
    """

    model: Any
    tokenizer: Any
    metrics: list[dict[str, Any]] = field(repr=False)
    summary: dict[str, Any]
    interrupted: bool
    out: str | None
    config: Config = field(repr=False)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the loss of the steps and of the evaluations.

        Args:
            path: where to write the picture, if anywhere; the ending says the format.

        Returns:
            A `matplotlib.figure.Figure`, which a notebook shows.

        Raises:
            InputError: matplotlib isn't installed, or `path` can't be written.
        """
        figure = new_figure(7, 4)
        axes = figure.subplots()
        steps = [row for row in self.metrics if row.get("loss") is not None]
        evaluations = [row for row in self.metrics if row.get("eval_loss") is not None]
        axes.plot([row["step"] for row in steps], [row["loss"] for row in steps], color="#0072B2", label="training")
        if evaluations:
            xs, ys = [row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations]
            axes.plot(xs, ys, color="#D55E00", marker="o", label="held-out answers")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token" if self.config.loss.preference is None else "loss")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        if path is not None:
            write_figure(figure, path, dpi=130)
        return figure

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the adapter as a PEFT folder, or after `full`, ReLoRA and ReMoRA the model as a HuggingFace folder.

        Args:
            path: the folder.
            overwrite: replace an adapter or a model that is in it; other files stay.

        Raises:
            InputError: something is there already and `overwrite` is False.
        """
        if self.config.adapter.config_class.changes_base:
            save_pretrained(self.model, path, self.tokenizer, overwrite=overwrite)
        else:
            save_adapter(self.model, path, overwrite=overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        licence: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload from mora-jax",
    ) -> str:
        """Uploads what `save` writes, with a card that is written from the run, as `mora_jax.push_to_hub` does.

        Args:
            repo_id: as there.
            licence: as there.
            private: as there.
            token: as there.
            commit_message: as there.

        Returns:
            The address of the upload.

        Raises:
            InputError: `repo_id` is none, or the hub can't be reached or refuses.
        """
        card = model_card(self.config, self.summary, repo_id, licence=licence)
        with tempfile.TemporaryDirectory(prefix="mora-jax-") as folder:
            self.save(folder)
            return upload(Path(folder), repo_id, card, private=private, token=token, commit_message=commit_message)


def finetune(
    model: nnx.Module | str | os.PathLike[str],
    rows: Any,
    adapter_config: Any = None,
    *,
    tokenizer: Any = None,
    loss: str = "masked",
    eval_rows: Any = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    optimizer: optax.GradientTransformation | None = None,
    out: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], Any]] = (),
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    display: Display | None = None,
) -> FinetuneResult:
    """Fine-tunes a model on instruction data, by the loop of `mora-jax train`: same settings, same losses.

    Args:
        model: a folder, a hub id, or a model of `load_pretrained` or of your own, which is trained in place. If it
            carries adapters already, those are trained, and after full fine-tuning all parameters again. One of your
            own is any NNX module with `(input_ids, segment_ids, positions) → logits`, see `OwnModel`.
        rows: dictionaries in any of the formats that files may have, a `datasets.Dataset`, a table of pandas; or
            paths, as `data.train`.
        adapter_config: a method's configuration, such as `MoRAConfig(rank=8)`; None for a model with adapters.
        tokenizer: for that of the model's folder.
        loss: the loss mode, as `loss.mode`, or an objective of preferences, as `loss.objective`: `"dpo"`.
        eval_rows: as `rows`; scored by the masked loss, or the objective of preferences, at the end and every
            `train.eval_every` steps.
        steps: optimiser steps; None: `train.epochs` passes over the data.
        batch_size: rows an optimiser step; None: the default of `train.batch_size`.
        learning_rate: its peak; None: the default of `optimizer.learning_rate`.
        optimizer: of optax, such as `optax.adamw(schedule)`, in place of the keys `optimizer.*` and of clipping. It
            gets dictionaries of float32 arrays by dotted path, stacked by layer. LoRA+ multiplies its updates; methods
            with restarts refuse it. Its rate is reported where its state has it (`optax.inject_hyperparams`).
        out: the run directory; None writes nothing, neither tokens nor compiled programs into the caches. With one,
            jax keeps what is compiled meanwhile in the user's cache folder (see `log.compilation_cache`); afterwards
            its settings are as before.
        callbacks: each is called with every row of metrics, of steps and of evaluations, in order; one that returns
            True ends the training after the step that runs meanwhile, the next one.
        config: any other keys of the configuration by dotted name: `{"data.max_length": 128}`.
        overwrite: replace a run that is in `out`.
        resume: go on with a run that is in `out`, of the same model, rows and settings, from its newest checkpoint;
            without one begin it.
        display: what is shown; None: a live bar on a terminal or in a notebook, plain lines elsewhere.

    Returns:
        The trained model with its metrics. An interrupt ends the training after the current step, and what was
        trained until then is returned.

    Raises:
        InputError: whatever has to be fixed, in one line.

    Examples:
        >>> import mora_jax as mj
        >>> from mora_jax import demo
        >>> rows = [{"prompt": "What is the capital of France?", "completion": "Paris"}] * 8
        >>> config = mj.LoRAConfig(rank=4)
        >>> result = mj.finetune(demo.model_path(), rows, config, steps=2, config={"data.max_length": 64})
        >>> [row["step"] for row in result.metrics]
        [1, 2]
    """
    if callable(learning_rate):
        raise InputError(
            "learning_rate is a number; a schedule goes into an optimizer: optimizer=optax.adamw(schedule)"
        )
    if callable(callbacks):
        raise InputError("callbacks is a list of functions: callbacks=[function]")
    arguments = {
        "train.steps": steps,
        "train.batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
    }
    objects, config_of = configured(model, rows, adapter_config, tokenizer, eval_rows, out, loss, arguments)
    if optimizer is not None:
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            hint = "config={'optimizer.name': 'lion'} names one"
            raise InputError(f"optimizer must be an object of optax, not {optimizer!r:.80}; {hint}")
        if learning_rate is not None or any(name.startswith("optimizer.") for name in config or {}):
            raise InputError("an optimizer that is given has its own settings: leave out learning_rate and optimizer.*")
        objects = dataclasses.replace(objects, optimizer=optimizer)
        config = dict(config or {}) | {"optimizer.name": OBJECT}
    run_config = config_of(dict(config or {}), "config")
    shown = make_display() if display is None else display
    directory = RunDirectory(out, note=shown.note)
    given = objects.model
    how: dict[str, Any] = {"objects": objects, "callbacks": callbacks, "overwrite": overwrite, "resume": resume}
    with new_run(run_config, directory, shown, **how) as trainer:
        try:
            code = trainer.train()
        finally:
            # The steps took over the arrays of a model that was given.
            trained = _trained(trainer, given)
    return FinetuneResult(
        trained,
        trainer.run.setup.tokenizer,
        directory.read_metrics(),
        dict(trainer.summary),
        code != 0,
        None if out is None else str(directory.path),
        run_config,
    )


def configured(
    model: nnx.Module | str | os.PathLike[str],
    rows: Any,
    adapter_config: Any,
    tokenizer: Any,
    eval_rows: Any,
    out: str | os.PathLike[str] | None,
    loss: str,
    arguments: Mapping[str, Any],
) -> tuple[InMemory, Callable[[dict[str, Any], str], Config]]:
    """The arguments of `finetune` as what is in memory, and as a checked configuration of each run with them.

    Args:
        model, rows, adapter_config, tokenizer, eval_rows, out, loss: as for `finetune`.
        arguments: its other ones, by the keys that they stand for; None for one that isn't given.

    Returns:
        What is in memory, and a function: values of further keys, and where they come from for messages, to the whole
        configuration. It raises `InputError` as this function does.

    Raises:
        InputError: whatever has to be fixed.
    """
    if not isinstance(model, nnx.Module | str | os.PathLike):
        raise InputError(f"model should be a path, a hub id or a module of Flax NNX, not {type(model).__name__}")
    objects = InMemory(
        model=model if isinstance(model, nnx.Module) else None,
        tokenizer=tokenizer,
        rows=memory_rows(rows),
        eval_rows=memory_rows(eval_rows),
    )
    given = {
        "model.path": None if isinstance(model, nnx.Module) else os.fspath(model),
        "data.train": _paths(rows, objects.rows, "rows"),
        "data.eval": None if eval_rows is None else _paths(eval_rows, objects.eval_rows, "eval_rows"),
        "out": None if out is None else os.fspath(out),
        "loss.objective" if loss in OBJECTIVES else "loss.mode": loss,
        **arguments,
    }
    return objects, lambda keys, origin: _configuration(objects, adapter_config, dict(given), keys, origin)


def _paths(given: Any, rows: Any, name: str) -> tuple[str, ...]:
    """What the configuration says of data: the paths, or that there were rows."""
    if rows is not None:
        return (NAME,)
    many = (given,) if isinstance(given, str | os.PathLike) else tuple(given) if isinstance(given, Iterable) else ()
    if not many:
        raise InputError(f"{name} is empty: give dictionaries, or paths of files that hold them")
    if wrong := [type(path).__name__ for path in many if not isinstance(path, str | os.PathLike)]:
        raise InputError(f"{name} should be dictionaries or paths, and one is {wrong[0]}")
    return tuple(os.fspath(path) for path in many)


def _configuration(
    objects: InMemory, adapter_config: Any, arguments: dict[str, Any], keys: dict[str, Any], origin: str
) -> Config:
    """All settings as one checked configuration."""
    model = objects.model
    if model is not None:
        if loading := next((name for name in keys if name.startswith("model.")), None):
            raise InputError(f"{origin}: {loading} says how a model is loaded, and the model given is loaded already")
        arguments["model.path"] = getattr(model, "name_or_path", None) or MODEL
    adapters = list(adapters_of(model)) if model is not None else []
    if adapters and adapter_config is not None:
        raise InputError("the model carries adapters already: leave out adapter_config to train them")
    fully_trained = model is not None and not adapters and bool(jax.tree.leaves(nnx.state(model, FullParam)))
    from_config = "adapter_config"
    if adapters:
        entry = min(adapters, key=lambda entry: entry.config.biases_alone)  # others train biases beside an adapter
        adapter_config, from_config = entry.config, "the model's adapters"
        if adapter_config.restarts:
            raise InputError(f"{entry.method} starts from a model without adapters: give adapter_config")
    settings: list[tuple[str, Any, str]] = []
    if fully_trained and (adapter_config is None or isinstance(adapter_config, FullConfig)):
        settings.append(("adapter.method", "full", "the model's parameters"))
    elif adapter_config is not None:
        given = adapter_settings(adapter_config)
        settings += [(f"adapter.{name}", value, from_config) for name, value in given.items()]
    elif not any(name.startswith("adapter.") for name in keys):
        raise InputError("adapter_config is missing: say what to train, such as LoRAConfig(rank=8) or FullConfig()")
    settings += [(name, value, name) for name, value in arguments.items() if value is not None]
    for name, value in keys.items():
        if arguments.get(name) is not None and name != "loss.mode":
            raise InputError(f"{origin}: {name} is given as an argument too")
        settings.append((name, value, origin))
    if arguments["out"] is None:
        asked = next((name for name in keys if name in _NEED_FOLDER and keys[name]), None)
        if asked:
            raise InputError(f"{origin}: {asked} writes files, which need a run directory: give out=")
        settings.append(("out", "(nothing is written)", "out"))
        caches = [name for name in ("data.cache", "log.compilation_cache") if name not in keys]
        settings += [(name, OFF, "out") for name in caches]
    config = check_together(lay_over(Config(), settings))
    of_users = model is not None and not isinstance(model, Decoder)
    if of_users and arguments["out"] is not None and config.adapter.config_class.changes_base:
        raise InputError(
            f"adapter.method={config.adapter.method} changes the model itself, which a run directory holds as a "
            "HuggingFace folder, and a model of your own has none: leave out out=, and save result.model yourself"
        )
    return config


#: Keys that make no sense without a run directory.
_NEED_FOLDER = ("train.save_every", "train.keep_best", "log.tensorboard", "log.wandb", "log.profile_steps")


def _trained(trainer: Trainer, given: nnx.Module | None) -> Any:
    """The trained model: the one that was given, if one was."""
    trained = trainer.model()
    if given is not None:
        nnx.update(given, nnx.state(trained))
        trained = given
    if trainer.run.config.adapter.config_class.restarts:
        merge(trained)
    return trained
