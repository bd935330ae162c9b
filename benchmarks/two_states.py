"""A training step of two states of the code, side by side: this checkout and another one.

    git worktree add ../before HEAD~5
    python benchmarks/two_states.py --other ../before --model SmolLM2-135M-Instruct --step mora:kind=rotation

Each state is a process of its own, with its own package and its own `training_step.py`; they take turns, a step each.
Printed is the time of a step by the clock and of CPU, medians, and the ratio of each pair of steps, this one's over the
other's.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measuring

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model}"
QUICK = "--step mora --rows 1 --length 32 --rounds 1"
ROOT = Path(__file__).resolve().parents[1]


def work(settings: dict[str, Any]) -> None:
    """A process: says that it is ready, then makes a step for each line that it gets."""
    from training_step import TrainingStep

    # An older checkout may ask for the layers an iteration of its loop.
    loop = {"unroll": 1} if "unroll" in inspect.signature(TrainingStep).parameters else {}
    step = TrainingStep(*settings["positional"], **loop, **settings["adapter"])
    step(0)
    print("{}", flush=True)
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        step()
        print(json.dumps([time.perf_counter() - start, time.process_time() - used]), flush=True)


class State:
    """A checkout's step in a process of its own."""

    def __init__(self, checkout: Path, settings: dict[str, Any]):
        paths = os.pathsep.join(map(str, (checkout, checkout / "benchmarks")))
        command = [sys.executable, __file__, "--work", json.dumps(settings)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=os.environ | {"PYTHONPATH": paths}
        )
        self._answer()

    def __call__(self, number: int) -> tuple[float, float]:
        """One step; its seconds by the clock and of CPU time."""
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        wall, cpu = self._answer()
        return wall, cpu

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(("[", "{}")):
                return json.loads(line)
        raise SystemExit(f"error: one of the two ended with exit code {self._process.wait()}")


def read_step(text: str) -> tuple[str, dict[str, Any]]:
    """`METHOD` or `METHOD:KEY=VALUE,…` as a method and keys of its section."""
    method, _, rest = text.partition(":")
    pairs = (pair.split("=", 1) for pair in rest.split(",") if pair)
    return method, {name: int(value) if value.isdigit() else value for name, value in pairs}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument(
        "--other", type=Path, default=ROOT, help="the other checkout; without it this one against itself"
    )
    parser.add_argument("--model", help="a HuggingFace folder")
    parser.add_argument("--step", action="append", type=read_step, metavar="METHOD[:KEY=VALUE,…]")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", help="of the base; the machine's default without it")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work))
        return
    print("| step | other, s | this, s | other, CPU s | this, CPU s | ratio of CPU time | least | most |")
    print(f"| --- |{' ---: |' * 7}", flush=True)
    for method, adapter in args.step or [read_step(name) for name in ("lora", "mora:kind=sharing", "full")]:
        positional = [args.model, args.dtype, method, args.rows, args.length]
        settings = {"positional": positional, "adapter": adapter}
        states = {"other": State(args.other.resolve(), settings), "this": State(ROOT, settings)}
        found = measuring.take_turns(states, args.rounds)
        for state in states.values():
            state.close()
        cpu = [found[name].cpu for name in ("other", "this")]
        ratios = [this / other for other, this in zip(*cpu, strict=True)]
        times = [statistics.median(values) for values in (found["other"].wall, found["this"].wall, *cpu)]
        columns = [f"{value:.2f}" for value in (*times, statistics.median(ratios), min(ratios), max(ratios))]
        print(f"| {' '.join([method, *map(str, adapter.values())])} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
