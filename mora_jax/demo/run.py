"""Runs the demo: every cell from the same start, one table, one plot."""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import operator
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mora_jax.demo import PARTS, STEPS, data_path, model_path
from mora_jax.demo.cells import METHODS, MODES, Judge, Method, train_cell
from mora_jax.demo.show import Question, Row, draw, print_answers, print_table, print_verdict
from mora_jax.display.progress import Report, progress
from mora_jax.errors import InputError
from mora_jax.interop import load_pretrained
from mora_jax.paths import local_path, new_file
from mora_jax.training.run.compilation_cache import persistent_compilation_cache

Say = Callable[[str], None]

TASK = """\
The task: a Llama of 785 thousand parameters, which has read lists, facts and the like but never a question, learns to
answer questions of twelve kinds, such as "{question}" ("{right}"). LoRA, two kinds of MoRA with as many trained
parameters, and full fine-tuning learn it, each twice: with loss on the answers (masked) and on the questions too
(unmasked). {cells} runs of {steps} steps; some minutes on two cores."""
NEXT = """\
What next:
  your own data   mora-jax train --config.model.path=MODEL --config.data.train=rows.jsonl --config.out=runs/1
  a real model    docs/tutorial.md, from the base's score to a served model
  step by step    notebooks/start.ipynb; three seeds and intervals in notebooks/learning_and_forgetting.ipynb"""


def run(
    *,
    methods: Sequence[Method] = METHODS,
    steps: int = STEPS,
    seed: int = 0,
    questions: int | None = None,
    say: Say = lambda line: None,
    report: Report = lambda done, total, words=None: None,
) -> tuple[list[Row], list[Question]]:
    """Fine-tunes with every method in both loss modes and measures each.

    Args:
      methods: the rows of the table, each twice.
      steps: optimiser steps of a cell.
      seed: of initial adapters and of the order of the data.
      questions: to choose by and to report, of each task; None for all.
      say: takes lines about the progress.
      report: told how far all cells are, in steps.

    Returns:
      The table's lines, the base model first, and the test questions in the order of their answers.
    """
    begun = time.perf_counter()
    cells = list(itertools.product(methods, MODES))
    report(0, len(cells) * steps, "the base model answers")
    rows, held_out, test = (_rows(part, None if part == "train" else questions) for part in PARTS)
    asked = [Question(*(message["content"] for message in row["messages"])) for row in test]
    first = asked[0]
    say(TASK.format(question=first.text, right=first.right, cells=len(cells), steps=steps))
    base, tokenizer = load_pretrained(model_path(), dtype="float32")
    judge = Judge(base, tokenizer, test)
    before, loss_before = judge(base), math.log(judge.perplexity(base, held_out))
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(base, nnx.Param)))
    say(f"base model: {total:,} parameters, exact match {before.exact_match:.1%}")
    lines = [Row("base model", "-", before)]
    for number, (method, mode) in enumerate(cells):
        started, name = time.perf_counter(), f"{method.name}, {mode}"

        def watch(step: int, stage: str, before: int = number * steps, name: str = name) -> None:
            report(before + step, len(cells) * steps, f"{name}: {stage}")

        trained = train_cell(method, mode, rows, held_out, steps=steps, seed=seed, watch=watch)
        watch(steps, "answering the test questions")
        scores, summary = judge(trained.model), trained.summary
        seconds = time.perf_counter() - started
        evaluations = [(row["step"], row["eval_loss"]) for row in trained.metrics if "eval_loss" in row]
        # A fresh adapter changes nothing, so every cell begins with the base's loss.
        at, losses = map(list, zip((0, loss_before), *evaluations, strict=True))
        speeds = summary["tokens_per_second"], seconds
        curve = {"steps": at, "held_out_loss": losses}
        lines.append(Row(method.name, mode, scores, summary["trainable_parameters"], *speeds, curve))
        say(f"{name}: exact match {scores.exact_match:.1%} after {seconds:.1f} s")
    say(f"all cells: {time.perf_counter() - begun:.0f} s")
    return lines, asked


def _rows(part: str, each: int | None) -> list[dict[str, Any]]:
    """A part's rows, or the first ones of each task."""
    with open(data_path(part), encoding="utf-8") as file:
        rows = list(map(json.loads, file))
    if each is None:
        return rows
    by_task = itertools.groupby(rows, operator.itemgetter("task"))
    return [row for _, group in by_task for row in itertools.islice(group, each)]


def execute(args: argparse.Namespace) -> int:
    """Runs the demo with parsed options; returns the exit code."""
    begun = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - begun:5.1f} s] {line}", file=sys.stderr, flush=True)

    with out_folder(args.out) as out:
        # Both loss modes of a method compile the same programs.
        with progress("loading") as report, persistent_compilation_cache(None):
            rows, asked = run(steps=args.steps, seed=args.seed, say=say, report=report)
        print_answers(rows, asked)
        print_table(rows, f"Test questions: {len(asked)}; {args.steps} steps a cell")
        print_verdict(rows, asked)
        write_figures(rows, out / "results.json")
        if importlib.util.find_spec("matplotlib") is None:
            say("no plot: matplotlib is not installed; pip install 'mora-jax[plots]' brings it")
        else:
            draw(rows, out / "curves.png")
            say(f"plot: {out / 'curves.png'}; all figures: {out / 'results.json'}")
        print(NEXT, file=sys.stderr)
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


def write_figures(rows: Sequence[Row], path: Path) -> None:
    """Writes every figure of the run as JSON, the answers included."""
    entries = []
    for row in rows:
        figures = {"trainable_parameters": row.trainable, "tokens_per_second": row.tokens_per_second}
        entry = {"method": row.method, "loss": row.mode, **figures, **dataclasses.asdict(row.scores)}
        entries.append(entry | ({"curve": row.curve, "wall_seconds": row.wall_seconds} if row.curve else {}))
    with new_file(path) as file:
        file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
