"""How long the loop keeps a step for itself: sending it, and recording it with every writer on and off.

    python benchmarks/host_overhead.py [--steps N]

Trains the demo model, whose steps are short, and prints medians over the steps of each run. `host` is the loop's own
time as metrics.jsonl has it, `whole` the step's. On a CPU both share the cores with the step itself, so that an
accelerator's host is quicker.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
from pathlib import Path

import mora_jax
from mora_jax.training import loop
from mora_jax.training.config import Config, lay_over
from mora_jax.training.display import Display

ASSETS = Path(mora_jax.__file__).parent / "demo" / "assets"
RUNS = {
    "metrics.jsonl alone": {},
    "with TensorBoard": {"log.tensorboard": True},
    "with Weights & Biases, offline": {"log.wandb": "host_overhead"},
    "traced throughout": {"log.profile_steps": 10**6, "log.profile_first": 1},
}
SETTINGS = {
    "model.path": str(ASSETS / "model"),
    "model.dtype": "float32",
    "data.train": (str(ASSETS / "instructions_train.jsonl"),),
    "data.max_length": 64,
    "train.batch_size": 1,
    "mesh.data": 1,
    "adapter.rank": 2,
    "adapter.targets": ("q_proj",),
}


def measure(out: Path, steps: int, settings: dict) -> tuple[float, float, float]:
    """Median seconds of a step: the loop's own, waiting for data, the whole."""
    values = SETTINGS | {"train.steps": steps, "out": str(out)} | settings
    config = lay_over(Config(), [(name, value, "benchmark") for name, value in values.items()])
    loop.train(config, Display(io.StringIO()))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = rows[len(rows) // 5 :]  # warm
    names = ("host_seconds", "data_wait_seconds", "step_seconds")
    host, data, whole = (statistics.median(row[name] for row in rows) for name in names)
    return host, data, whole


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each run (default: 300)")
    steps = parser.parse_args().steps
    print("| run | host, ms a step | data wait, ms | whole, ms |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, settings) in enumerate(RUNS.items()):
            found = measure(Path(folder) / str(number), steps, settings)
            print(f"| {name} | " + " | ".join(f"{seconds * 1e3:.2f}" for seconds in found) + " |", flush=True)


if __name__ == "__main__":
    main()
