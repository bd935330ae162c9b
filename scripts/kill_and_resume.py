"""Kills a run again and again at random moments, resumes it each time, and compares it with an unbroken run.

    python scripts/kill_and_resume.py --kills 50 --out kills -- \\
        --config.model.path=MODEL --config.data.train=DATA --config.train.steps=6000 --config.train.save_every=7

What follows `--` goes to `mora-jax train`; the script sets `config.out`. The run is killed by SIGKILL, which no
process can catch: half of the kills come at a random moment after its first step, the others at a random moment of its
whole life, reading and compiling and writing the first files included. It goes on with
`mora-jax train --resume RUN` alone, and with the first command only where the kill came before there was a run.

At the end, after a last resume that nobody disturbs:

- `metrics.jsonl` holds every step once, in order, and its losses, gradient norms, learning rates and numbers of tokens
  equal those of the unbroken run, bit for bit;
- so do the bytes of `adapter/adapter_model.safetensors` (of `model/model.safetensors` for full fine-tuning);
- the adapter file's metadata is exactly `{"format": "pt"}`.

Exit status 0 where all that holds, 1 where it doesn't. Choose enough steps: where the run ends before the last kill
the script says so and fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import safe_open

EXACT = ("step", "loss", "grad_norm", "learning_rate", "tokens", "trained_tokens", "eval_loss", "eval_accuracy")
RESULTS = ("adapter/adapter_model.safetensors", "model/model.safetensors")


class Process:
    """A run of `mora-jax train` with its stderr in a file; knows when its first step was shown."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]):
        self.log, self.began = log, time.monotonic()
        self.stepping = threading.Event()
        command = [sys.executable, "-m", "mora_jax", "train", *arguments]
        self._child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stderr is not None
        with self.log.open("a", encoding="utf-8") as file:
            for line in self._child.stderr:
                file.write(line)
                if line.startswith("step "):
                    self.stepping.set()

    def wait_until(self, moment: float, steps_for: float) -> None:
        """Waits until a moment, until it has shown steps for some seconds, or for its end, whatever comes first."""
        while self._child.poll() is None and time.monotonic() < moment:
            if self.stepping.wait(0.01):
                time.sleep(max(0.0, min(steps_for, moment - time.monotonic())))
                return

    def wait(self) -> int:
        """Waits for its end; returns its exit status."""
        self._child.wait()
        self._reader.join()
        return self._child.returncode

    def kill(self) -> bool:
        """Kills it; returns whether there was anything left to kill."""
        self._child.kill()
        code = self._child.wait()
        self._reader.join()
        return code == -9


def complete(arguments: list[str], log: Path, environment: dict[str, str]) -> float:
    """Runs to the end; returns the seconds from the first step on."""
    process = Process(arguments, log, environment)
    process.wait_until(math.inf, 0.0)
    start = time.monotonic()
    if code := process.wait():
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
        raise SystemExit(f"{' '.join(arguments)} ended with {code}:\n{tail}")
    return time.monotonic() - start


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: row[name] for name in EXACT if name in row} for row in map(json.loads, lines)]


def differences(broken: Path, unbroken: Path) -> list[str]:
    """What differs between the two runs, in words; also prints what was compared."""
    found = []
    ours, theirs = rows(broken), rows(unbroken)
    steps = Counter(row["step"] for row in ours if "loss" in row)
    twice = [step for step, count in steps.items() if count > 1]
    if twice:
        found.append(f"{len(twice)} steps stand in metrics.jsonl more than once, such as {twice[0]}")
    if ours != theirs:
        first = next((a for a, b in zip(ours, theirs, strict=False) if a != b), None)
        found.append(f"metrics differ: {len(ours)} rows and {len(theirs)}, first difference {first}")
    print(f"metrics.jsonl: {len(ours)} rows, {len(steps)} steps, each once: {not twice}; equal: {ours == theirs}")
    for name in RESULTS:
        if not (unbroken / name).is_file():
            continue
        same = (broken / name).read_bytes() == (unbroken / name).read_bytes()
        with safe_open(broken / name, "np") as file:
            metadata = file.metadata()
        print(f"{name}: {(broken / name).stat().st_size} bytes, equal: {same}; metadata {json.dumps(metadata)}")
        if not same:
            found.append(f"{name} differs")
        if metadata != {"format": "pt"}:
            found.append(f"{name} has the metadata {metadata}")
    return found


def main() -> int:
    """Runs the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how often the run is killed (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, required=True, help="folder for both runs and their logs; must be new")
    parser.add_argument("settings", nargs="+", metavar="--config.KEY=VALUE", help="after --: the run's own settings")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    draw = random.Random(args.seed)
    environment = dict(os.environ)
    # A compiled step is kept between the lives of a run; the first of them compiles it.
    cache = tempfile.TemporaryDirectory(prefix="kill-and-resume-")
    environment |= {"JAX_COMPILATION_CACHE_DIR": cache.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    unbroken, broken, log = args.out / "unbroken", args.out / "broken", args.out / "broken.log"

    began = time.monotonic()
    training = complete([*args.settings, f"--config.out={unbroken}"], args.out / "unbroken.log", environment)
    startup = time.monotonic() - began - training
    print(f"unbroken: {startup:.1f} s until the first step, {training:.1f} s from there", flush=True)
    # The mean progress of a life is less than its share of the run.
    window = 1.3 * training / args.kills
    kills: Counter[str] = Counter()
    lengths = []
    while sum(kills.values()) < args.kills:
        fresh = not (broken / "config.json").is_file()
        arguments = [*args.settings, f"--config.out={broken}"] if fresh else ["--resume", str(broken)]
        process = Process(arguments, log, environment)
        early = process.began + draw.uniform(0, startup) if draw.random() < 0.5 else math.inf
        process.wait_until(early, draw.uniform(0, window))
        if not process.kill():
            code, count = process.wait(), sum(kills.values())
            advice = "; choose more steps" if code == 0 else ""
            print(f"the run ended by itself, with {code}, after {count} kills: see {log}{advice}")
            return 1
        kills["while it trained" if process.stepping.is_set() else "before its first step"] += 1
        lengths.append(time.monotonic() - process.began)
        done = sorted((int(path.name) for path in (broken / "checkpoints").glob("*") if path.name.isdigit()), key=int)
        print(f"kill {sum(kills.values())} after {lengths[-1]:.2f} s; checkpoints of steps {done}", flush=True)
    complete(["--resume", str(broken)], log, environment)
    counts = ", ".join(f"{count} {when}" for when, count in sorted(kills.items()))
    print(f"{sum(kills.values())} kills ({counts}), {min(lengths):.2f} to {max(lengths):.2f} s after each start")
    found = differences(broken, unbroken)
    print("; ".join(found) if found else "the killed run and the unbroken one are equal")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
