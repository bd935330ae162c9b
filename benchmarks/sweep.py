"""Runs that train together over one base against the same runs one after the other: steps a second of both.

    python benchmarks/sweep.py --model SmolLM2-135M-Instruct --rows 1 --length 128 [--runs 8] [--methods lora mora]

Without `--model` the embedded demo model is taken. In each round every run makes a step alone, by the compiled step of
`mora-jax train`, and then all make one together, by that of `mora-jax sweep`; the ratio is that of the round's times,
and the table gives its median with the quartiles, by the clock and in CPU time of all threads. What compiling took is
given beside: alone it is paid by each run. `one run, s` is a step of a single run with the tokens of all: what a step
together would take if more than one adapter cost nothing. Adds its rows to the table in `--out`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from measuring import stamped, without_stamp

import mora_jax as mj
from mora_jax.demo import data_path, model_path
from mora_jax.sweeps.stack import Stack
from mora_jax.training.build_step import assemble
from mora_jax.training.config.schema import AdapterConfig, Config, OptimizerConfig
from mora_jax.training.setup import put_adapter
from mora_jax.training.sharding.mesh import make_mesh

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --out {table}"
QUICK = "--methods lora --runs 2 --length 16 --rounds 2"
STEPS = 1000
HEAD = (
    "| model | method | rows × length | trained tokens | runs | together, by the clock | in CPU time | alone, s a step "
    "of all | together, s | one run, s | compiling once alone, s | together, s |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def batches(vocabulary: int, runs: int, rows: int, length: int, share: float) -> list[dict[str, np.ndarray]]:
    """A batch for each run; the last `share` of each row's tokens carries loss."""
    random = np.random.default_rng(0)
    weights = np.zeros((1, rows, length), np.float32)
    weights[..., length - round(share * length) :] = 1.0
    ones = np.ones((1, rows, length), np.int32)
    return [
        {
            "input_ids": random.integers(0, vocabulary, (1, rows, length), np.int32),
            "segment_ids": ones,
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape).copy(),
            "weights": weights,
            "counts": weights.sum(-1),
        }
        for _ in range(runs)
    ]


class Contest:
    """Runs of one method, alone and together.

    Args:
        base: graph and state of the base model, which all share.
        adapter: the section `adapter`.
        batches: one a run.
    """

    def __init__(self, base: Any, adapter: AdapterConfig, batches: list[dict[str, np.ndarray]]):
        self.batches = batches
        self.alone: list[Any] = []
        mesh = make_mesh(1)
        self.stack = Stack(mesh)
        self.states: list[Any] = []
        for index in range(len(batches)):
            optimizer = OptimizerConfig(learning_rate=1e-4 * (index + 1), schedule="constant")
            config = Config(seed=index, adapter=adapter, optimizer=optimizer)
            model = nnx.merge(*base)
            put_adapter(model, config, STEPS)
            made = assemble(model, config, STEPS, mesh)
            self.states.append(made.placed_state(index))
            self.stack.join(made, optimizer, STEPS)
            # Steps donate their state.
            own = jax.tree.map(lambda array: array.copy(), self.states[index])
            if index == 0:
                self.runner: Any = made.runner  # the others' differ in a constant alone
                self.frozen = self.runner.place(made.frozen)
            self.alone.append(own)

    def step_alone(self) -> list[Any]:
        """Every run makes a step of its own."""
        losses = []
        for index, batch in enumerate(self.batches):
            placed = self.runner.place_batch(batch)
            self.alone[index], metrics = self.runner(self.alone[index], self.frozen, placed)
            losses.append(metrics.loss)
        return jax.block_until_ready(losses)

    def step_as_one(self) -> Any:
        """The first run makes a step with the rows of all."""
        rows = {name: np.concatenate([batch[name] for batch in self.batches], axis=1) for name in self.batches[0]}
        self.alone[0], metrics = self.runner(self.alone[0], self.frozen, self.runner.place_batch(rows))
        return jax.block_until_ready(metrics.loss)

    def step_together(self) -> list[Any]:
        """All runs make a step together."""
        replies = self.stack.step(self.states, dict(enumerate(self.batches)))
        return [member.read(fetched)[0].loss for member, fetched in replies.values()]

    def compile_seconds(self) -> tuple[float, float]:
        """What compiling took, of a step alone and of the step together."""
        logs = self.runner.compilation_log, self.stack.compilation_log
        return sum(one.seconds for one in logs[0]), sum(one.seconds for one in logs[1])


def timed(step: Any) -> tuple[float, float]:
    """Seconds by the clock and of CPU time."""
    start = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def quartiles(ratios: list[float]) -> str:
    """`2.9× (2.8–3.1)`."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f}× ({low:.2f}–{high:.2f})"


def row(name: str, method: str, contest: Contest, share: float, rounds: int) -> str:
    """A row of the table."""
    first = contest.step_alone()[0], contest.step_together()[0]
    assert np.allclose(*map(float, first), rtol=1e-4), first
    compiling = contest.compile_seconds()
    contest.step_as_one()
    steps = (contest.step_together, contest.step_alone, contest.step_as_one)
    together, alone, as_one = zip(*([timed(step) for step in steps] for _ in range(rounds)), strict=True)
    wall, cpu = ([a[i] / t[i] for a, t in zip(alone, together, strict=True)] for i in (0, 1))
    _, rows, length = contest.batches[0]["input_ids"].shape
    seconds = [statistics.median(times[0] for times in side) for side in (alone, together, as_one)]
    cells = [
        name,
        method,
        f"{rows} × {length}",
        f"{share:.0%}",
        str(len(contest.batches)),
        quartiles(wall),
        quartiles(cpu),
    ]
    cells += [f"{value:.3g}" for value in (*seconds, *compiling)]
    return f"| {' | '.join(cells)} |"


def command(*words: str) -> tuple[float, float]:
    """Runs a command of mora-jax; returns its seconds by the clock and of CPU time."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-m", "mora_jax", *words], check=True, capture_output=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


def whole(model: str, method: str, args: argparse.Namespace) -> str:
    """A row about whole commands: as many runs as `--runs` says, which differ in the learning rate."""
    rates = [f"{1e-4 * (number + 1):.4g}" for number in range(args.runs[0])]
    with tempfile.TemporaryDirectory() as folder:
        common = [
            f"--config.model.path={model}",
            f"--config.data.train={data_path()}",
            f"--config.model.dtype={args.dtype}",
        ]
        common += [f"--config.adapter.method={method}", f"--config.adapter.rank={args.rank}", "--config.mesh.data=1"]
        common += [f"--config.train.batch_size={args.rows[0]}", f"--config.data.max_length={args.length}"]
        common += [f"--config.train.steps={args.whole}", f"--config.data.cache={folder}/cache"]
        key = "optimizer.learning_rate"
        together = command("sweep", *common, f"--config.out={folder}/sweep", "--sweep", f"{key}={','.join(rates)}")
        alone = [
            command("train", *common, f"--config.out={folder}/{rate}", f"--config.{key}={rate}")
            for rate in rates[: args.measured or None]
        ]
    share = len(rates) / len(alone)
    sums = [share * sum(times) for times in zip(*alone, strict=True)]
    cells = [Path(model).name, args.dtype, method, f"{args.rows[0]} × {args.length}", str(args.whole), str(len(rates))]
    cells += [f"{sums[0]:.0f}", f"{together[0]:.0f}", f"{sums[0] / together[0]:.2f}×"]
    cells += [f"{sums[1]:.0f}", f"{together[1]:.0f}", f"{sums[1] / together[1]:.2f}×"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="HuggingFace folder or hub id; the embedded demo model without it")
    parser.add_argument("--methods", nargs="+", default=["lora", "mora"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--runs", type=int, nargs="+", default=[8])
    parser.add_argument("--trained", type=float, default=0.5, help="share of the tokens that carries loss")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--whole", type=int, metavar="STEPS", help="measure whole commands of so many steps")
    parser.add_argument("--measured", type=int, help="with --whole: runs alone that are measured, for all of them")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.whole:
        for method in args.methods:
            print(whole(str(args.model or model_path()), method, args), f"load {os.getloadavg()[0]:.0f}", flush=True)
        return
    model, _ = mj.load_pretrained(args.model or model_path(), dtype=args.dtype)
    base = nnx.split(model)
    name = f"{Path(args.model).name if args.model else 'demo'}, {args.dtype}"
    for rows in args.rows:
        for method in args.methods:
            for runs in args.runs:
                contest = Contest(
                    base,
                    AdapterConfig(method=method, rank=args.rank),
                    batches(model.config.vocab_size, runs, rows, args.length, args.trained),
                )
                text = row(name, method, contest, args.trained, args.rounds)
                print(text, f"load {os.getloadavg()[0]:.0f}", flush=True)
                if args.out is not None:
                    old = args.out.read_text() if args.out.exists() else "\n".join(HEAD) + "\n"
                    args.out.write_text(stamped(f"{without_stamp(old).rstrip()}\n{text}\n", old))


if __name__ == "__main__":
    main()
