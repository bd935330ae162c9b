"""Runs the demo: every cell from the same start, one table, one plot."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import operator
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from mora_jax.demo import PARTS, STEPS, data_path, model_path
from mora_jax.demo.cells import METHODS, MODES, Curve, Method, train_cell
from mora_jax.demo.measure import Judge
from mora_jax.demo.plot import draw
from mora_jax.demo.table import Row, print_table
from mora_jax.display.progress import Report, progress
from mora_jax.errors import InputError
from mora_jax.interop import load_pretrained
from mora_jax.paths import local_path, new_file

Say = Callable[[str], None]


@dataclasses.dataclass
class Results:
    """Everything that the run measured."""

    rows: list[Row]
    curves: dict[tuple[str, str], Curve]
    seconds: dict[tuple[str, str], float]


def run(
    *,
    methods: Sequence[Method] = METHODS,
    steps: int = STEPS,
    seed: int = 0,
    questions: int | None = None,
    say: Say = lambda line: None,
    report: Report = lambda done, total, words=None: None,
) -> Results:
    """Fine-tunes with every method in both loss modes and measures each.

    Args:
      methods: the rows of the table, each twice.
      steps: optimiser steps of a cell.
      seed: of initial adapters and of the order of the data.
      questions: to choose by and to report, of each task; None for all.
      say: takes lines about the progress.
      report: told how far all cells are, in steps.
    """
    begun = time.perf_counter()
    cells = list(itertools.product(methods, MODES))
    report(0, len(cells) * steps, "the base model answers")
    rows, held_out, test = (_rows(part, None if part == "train" else questions) for part in PARTS)
    base, tokenizer = load_pretrained(model_path(), dtype="float32")
    judge = Judge(base, tokenizer, test)
    before, watched = judge(base), judge.perplexity(base, held_out)
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(base, nnx.Param)))
    say(f"base model: {total:,} parameters, exact match {before.exact_match:.1%}")
    results = Results([Row("base model", "-", 0, before)], {}, {})
    with compiled_once():
        for number, (method, mode) in enumerate(cells):
            started = time.perf_counter()

            def watch(
                step: int, words: str, before: int = number * steps, cell: str = f"{method.name}, {mode}"
            ) -> None:
                report(before + step, len(cells) * steps, f"{cell}: {words}")

            trained = train_cell(method, mode, rows, held_out, steps=steps, seed=seed, watch=watch)
            watch(steps, "answering the test questions")
            scores = judge(trained.model)
            seconds = time.perf_counter() - started
            key, summary = (method.name, mode), trained.summary
            results.rows.append(
                Row(*key, summary["trainable_parameters"], scores, before, summary["tokens_per_second"])
            )
            results.curves[key] = Curve.of(trained.metrics, watched)
            results.seconds[key] = seconds
            say(f"{method.name}, {mode}: exact match {scores.exact_match:.1%} after {seconds:.1f} s")
    say(f"all cells: {time.perf_counter() - begun:.0f} s")
    return results


def _rows(part: str, each: int | None) -> list[dict[str, Any]]:
    """A part's rows, or the first ones of each task."""
    with open(data_path(part), encoding="utf-8") as file:
        rows = list(map(json.loads, file))
    if each is None:
        return rows
    by_task = itertools.groupby(rows, operator.itemgetter("task"))
    return [row for _, group in by_task for row in itertools.islice(group, each)]


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Lets runs that compile the same program share it, as both loss modes of a method do."""
    folder, seconds = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    given = {key: getattr(jax.config, key) for key in (folder, seconds)}
    if given[folder]:
        yield
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        try:
            jax.config.update(folder, made)
            jax.config.update(seconds, 0.5)
            reset_cache()
            yield
        finally:
            for key, value in given.items():
                jax.config.update(key, value)
            reset_cache()


def execute(args: argparse.Namespace) -> int:
    """Runs the demo with parsed options; returns the exit code."""
    say = _Progress()
    with out_folder(args.out) as out:
        return _run_into(out, args, say)


def _run_into(out: Path, args: argparse.Namespace, say: Say) -> int:
    with progress("loading") as report:
        results = run(steps=args.steps, seed=args.seed, say=say, report=report)
    title = f"Test questions: {len(results.rows[0].scores.answers)}; {args.steps} steps a cell"
    print_table(results.rows, title)
    write_figures(results, out / "results.json")
    if importlib.util.find_spec("matplotlib") is None:
        say("no plot: matplotlib is not installed; pip install 'mora-jax[plots]' brings it")
    else:
        draw(results.rows, results.curves, out / "curves.png")
        say(f"plot: {out / 'curves.png'}; all figures: {out / 'results.json'}")
    return 0


@contextlib.contextmanager
def out_folder(given: str | Path) -> Iterator[Path]:
    """The folder of plot and figures, made and tried before minutes go into what is to be written there.

    Where the block fails or is stopped, folders that were made for it and are empty go again.

    Raises:
        InputError: it can't be made, or takes no files.
    """
    out = local_path(given)
    absent = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as error:
            raise InputError(f"--out {out} cannot be written: {error.strerror}") from None
        yield out
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in absent:
                folder.rmdir()
        raise


def write_figures(results: Results, path: Path) -> None:
    """Writes every figure of the run as JSON, the answers included."""
    rows = []
    for row in results.rows:
        entry = {
            "method": row.method,
            "loss": row.mode,
            "trainable_parameters": row.trainable,
            "tokens_per_second": row.tokens_per_second,
            **dataclasses.asdict(row.scores),
        }
        curve = results.curves.get((row.method, row.mode))
        if curve is not None:
            entry["curve"] = dataclasses.asdict(curve)
            entry["wall_seconds"] = results.seconds[row.method, row.mode]
        rows.append(entry)
    with new_file(path) as file:
        file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


class _Progress:
    """Lines on stderr with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self, line: str) -> None:
        print(f"[{time.perf_counter() - self._start:5.1f} s] {line}", file=sys.stderr, flush=True)
