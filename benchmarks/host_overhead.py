"""How long the loop keeps a step for itself: sending it, and recording it with every writer on and off.

    python benchmarks/host_overhead.py [--steps N]

Trains the demo model, whose steps are short, and prints medians over the steps of each run: the loop's own time as
metrics.jsonl has it (`host`), the whole step, and the processor time of the loop's thread, which other programs on
the same cores disturb least. On a CPU the thread also runs parts of the step itself.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mora_jax
from mora_jax.training import loop
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.display import Display

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = ""
QUICK = "--steps 20"
NEEDS = ("tensorboardX", "wandb")

ASSETS = Path(mora_jax.__file__).parent / "demo" / "assets"
RUNS: dict[str, dict[str, Any]] = {
    "metrics.jsonl alone": {},
    "a row every 10 steps": {"train.log_every": 10},
    "with TensorBoard": {"log.tensorboard": True},
    "with Weights & Biases, offline": {"log.wandb": "host_overhead"},
    "traced throughout": {"log.profile_steps": 10**6, "log.profile_first": 1},
    "mesh.pmap": {"mesh.pmap": True},
}
SETTINGS: dict[str, Any] = {
    "model.path": str(ASSETS / "model"),
    "model.dtype": "float32",
    "data.train": (str(ASSETS / "instructions_train.jsonl"),),
    "data.max_length": 64,
    "train.batch_size": 1,
    "mesh.data": 1,
    "adapter.rank": 2,
    "adapter.targets": ("q_proj",),
}


class Counting(Display):
    """Notes the processor time of the loop's thread at each row."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.seconds: list[tuple[int, float]] = []

    def step(self, row: Mapping[str, Any]) -> None:
        """Notes it."""
        self.seconds.append((row["step"], time.thread_time()))


def measure(out: Path, steps: int, settings: dict[str, Any]) -> list[float]:
    """Median seconds of a step: the loop's own, the whole, and processor time."""
    values = SETTINGS | {"train.steps": steps, "out": str(out)} | settings
    config = lay_over(Config(), [(name, value, "benchmark") for name, value in values.items()])
    display = Counting()
    loop.train(config, display)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    warm = len(rows) // 5
    found = [statistics.median(row[name] for row in rows[warm:]) for name in ("host_seconds", "step_seconds")]
    points = display.seconds[warm:]
    pairs = zip(points, points[1:], strict=False)
    return [*found, statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each run (default: 300)")
    steps = parser.parse_args().steps
    print("| run | host, ms a step | whole, ms | processor time of the loop's thread, ms |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, settings) in enumerate(RUNS.items()):
            found = measure(Path(folder) / str(number), steps, settings)
            print(f"| {name} | " + " | ".join(f"{seconds * 1e3:.2f}" for seconds in found) + " |", flush=True)


if __name__ == "__main__":
    main()
