"""Where the seconds of a run's start go: the first start, and the second with what was compiled kept.

    python benchmarks/start.py --model SmolLM2-135M-Instruct --json FILE.json

Each start is a process of its own that trains one step (LoRA, `--rows` × `--length` tokens) as `mora-jax train` does.
Seconds are by the clock and, of all cores, of CPU time, in which other work on the machine counts less; a part doesn't
count what another part named here does inside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --json {json}"
QUICK = "--rows 1 --length 32"
BEGUN, STEP = time.perf_counter(), "from the start to the end of the first step"
PARTS = (
    "interpreter and imports",
    "reading the model",
    "rows to batches",
    "adapter and step put together",
    "tracing and lowering the step",
    "compiling the step, or looking it up",
    "compiling all else, or looking it up",
    "first step",
    "saving and the rest",
)


class Parts:
    """Adds up the seconds of parts, each without those inside it, by the clock and of CPU time.

    Args:
        since: both at the process's start.

    Attributes:
        left: by part, what had passed since the process's start when it was left last.
    """

    def __init__(self, since: tuple[float, float]) -> None:
        self.seconds = {part: [0.0, 0.0] for part in PARTS}
        self.left = dict[str, list[float]]()
        self._stack = [PARTS[-1]]
        self._since = self._start = since

    def enter(self, part: str) -> None:
        """A part begins inside the present one; compiling the step is not told from what does it."""
        self._book()
        part = PARTS[5] if part == PARTS[6] and self._stack[-1] == PARTS[5] else part
        self._stack.append(part)

    def leave(self) -> None:
        """The present part ends."""
        self._book()
        self.left[self._stack.pop()] = [now - start for now, start in zip(self._since, self._start, strict=True)]

    def _book(self) -> None:
        now = time.perf_counter(), time.process_time()
        for i, before in enumerate(self._since):
            self.seconds[self._stack[-1]][i] += now[i] - before
        self._since = now

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Counts what a function does as `part`."""
        function = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **options)
            finally:
                self.leave()

        setattr(owner, name, timed)


def work(options: list[str]) -> None:
    """A start in this process: prints the parts."""
    parts = Parts((BEGUN, 0.0))
    parts.enter(PARTS[0])
    import jax
    from jax._src import compiler

    from mora_jax.cli.main import main
    from mora_jax.training import loop, setup
    from mora_jax.training.sharding.runner import JitRunner, Runner

    parts.leave()
    parts.wrap(setup, "load_pretrained", PARTS[1])
    parts.wrap(setup, "encode_data", PARTS[2])
    parts.wrap(setup, "put_adapter", PARTS[3])
    parts.wrap(loop, "assemble", PARTS[3])
    parts.wrap(JitRunner, "lower", PARTS[4])
    parts.wrap(compiler, "compile_or_get_cached", PARTS[6])
    parts.wrap(jax.stages.Lowered, "compile", PARTS[5])  # which the step alone is compiled by
    parts.wrap(Runner, "__call__", PARTS[7])
    parts.wrap(Runner, "read", PARTS[7])  # waits for the step
    sys.argv = ["mora-jax", "train", *options]
    code = main()
    parts.enter(PARTS[-1])
    print(json.dumps({"code": code, "parts": parts.seconds, STEP: parts.left[PARTS[7]]}), flush=True)


def start(args: argparse.Namespace, folder: Path, number: int) -> dict[str, list[float]]:
    """One start in a new process; seconds by part, by the clock and of CPU time."""
    settings = {
        "model.path": args.model,
        "model.dtype": args.dtype,
        "data.train": args.data or folder / "rows.json",
        "data.max_length": args.length,
        "train.batch_size": args.rows,
        "train.steps": 1,
        "out": folder / f"run{number}",
        "log.compilation_cache": folder / "programs",
    }
    options = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, __file__, "--work", *options]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["MORA_JAX_CACHE"] = str(folder / "cache")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"error: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    whole = [sum(part[i] for part in found["parts"].values()) for i in range(2)]
    return found["parts"] | {STEP: found[STEP], "all": whole}


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--dtype", default="float32", help="none: as train chooses")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--data", type=Path, help="a file to train on, in place of eight long rows")
    parser.add_argument("--json", type=Path, help="where to write the seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = " ".join(["red", "green", "blue"] * args.length)
        rows = [{"instruction": f"Say {number}.", "output": words} for number in range(8)]
        (folder / "rows.json").write_text(json.dumps(rows))
        starts = [start(args, folder, number) for number in (1, 2)]
    print(f"{args.rows} × {args.length} tokens, LoRA, {args.dtype}; seconds by the clock, in brackets of CPU time\n")
    print("| part | first start | second start |\n| --- | ---: | ---: |")
    for part in starts[0]:
        first, second = (one[part] for one in starts)
        print(f"| {part} | {first[0]:.2f} ({first[1]:.2f}) | {second[0]:.2f} ({second[1]:.2f}) |")
    if args.json is not None:
        args.json.write_text(json.dumps({"first": starts[0], "second": starts[1]}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
