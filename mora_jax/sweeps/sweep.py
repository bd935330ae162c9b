"""Sweeps from Python: the loop of `mora-jax sweep` on a model and rows that a program has."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mora_jax.errors import InputError
from mora_jax.models.decoder import Decoder
from mora_jax.sweeps.board import Board, make_board
from mora_jax.sweeps.folder import SweepFolder
from mora_jax.sweeps.grid import combinations, expand
from mora_jax.sweeps.results import SweepResult
from mora_jax.sweeps.train import train_runs
from mora_jax.training.finetune import configured


def sweep(
    model: Decoder | str | os.PathLike[str],
    rows: Any,
    adapter_config: Any = None,
    *,
    grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]],
    tokenizer: Any = None,
    loss: str = "masked",
    eval_rows: Any = None,
    steps: int | None = None,
    batch_size: int | None = None,
    out: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], Any]] = (),
    config: Mapping[str, Any] | None = None,
    at_once: int | None = None,
    overwrite: bool = False,
    board: Board | None = None,
) -> SweepResult:
    """Fine-tunes a model with several settings at once; each run has the result of `finetune` with its settings.

    Runs that differ in numbers alone (learning rate and its schedule, weight decay, seed, loss mode) train together:
    one compiled step over one base in memory. Others follow in groups of their own.

    Args:
        model: as for `finetune`; one in memory is not changed.
        rows: dictionaries or paths, as for `finetune`.
        adapter_config: a method's configuration; None where `grid` or `config` says the method.
        grid: the values of each swept key, by its dotted name: `{"optimizer.learning_rate": [1e-4, 1e-3], "seed": [0,
            1]}` means all combinations. Or a list of dictionaries, one a run: `[{"adapter.method": "lora",
            "optimizer.learning_rate": 1e-3}, …]`.
        tokenizer: for that of the model's folder.
        loss: the loss mode.
        eval_rows: scored by the masked loss at the end and every `train.eval_every` steps.
        steps: optimiser steps.
        batch_size: rows an optimiser step.
        out: the sweep's folder, with a run directory a run below `runs`; None writes nothing. A sweep that was stopped
            goes on if it is called again with the same arguments.
        callbacks: each is called with every row of metrics of every run, which has the run's name under `run`; one that
            returns True ends that run after its step.
        config: any other keys of the configuration by dotted name.
        at_once: the most runs that train together, where memory is short; None for no limit.
        overwrite: replace a sweep that is in `out`.
        board: what is shown; None: a live table on a terminal or in a notebook, plain lines elsewhere.

    Returns:
        What came of each run, and the best.

    Raises:
        InputError: whatever has to be fixed, in one line.

    Examples:
        >>> import mora_jax as mj
        >>> from mora_jax import demo
        >>> rows = [{"prompt": "What is the capital of France?", "completion": "Paris"}] * 8
        >>> rates = {"optimizer.learning_rate": [1e-3, 3e-3]}
        >>> settings = {"data.max_length": 64}
        >>> result = mj.sweep(demo.model_path(), rows, mj.LoRAConfig(rank=4), grid=rates, steps=2, config=settings)
        >>> [run.name for run in result.runs]
        ['learning_rate=0.001', 'learning_rate=0.003']
    """
    settings = combinations(grid) if isinstance(grid, Mapping) else [dict(values) for values in grid]
    if not settings:
        raise InputError("grid is empty: give a dictionary of keys with their values, or one dictionary a run")
    common = dict(config or {})
    both = next((name for values in settings for name in values if name in common), None)
    if both:
        raise InputError(f"{both} is in config and in grid; leave it out of one of them")
    arguments = {"loss.mode": loss, "train.steps": steps, "train.batch_size": batch_size}
    objects, config_of = configured(model, rows, adapter_config, tokenizer, eval_rows, out, arguments)
    path = None if out is None else os.fspath(out)
    folder = None if path is None else SweepFolder(path)
    runs = expand(settings, lambda values: config_of(common | values, "grid"), path)
    shown = make_board() if board is None else board
    return train_runs(runs, folder, shown, objects=objects, callbacks=callbacks, at_once=at_once, overwrite=overwrite)
