"""What each method costs on one model: trained parameters, size on disk, time of a step, memory.

    python benchmarks/method_cost.py --model SmolLM2-135M-Instruct [--rounds 7] [--rows 2] [--length 128]

All methods adapt every linear layer at rank 8 (VeRA at its own 256; IA³ its own layers) and share one base in memory.
They take turns in one process, one step each a round, and a method's time is the median over the rounds of its time
over LoRA's in the same round, so that what else the machine does weighs on both. Memory is what the compiler plans: the
arguments of the step (base, trained arrays, optimizer, batch) and its temporary buffers. Writes a Markdown table into
`--out`.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.registry import METHODS
from mora_jax.errors import InputError
from mora_jax.training.config import OptimizerConfig
from mora_jax.training.mesh import make_mesh
from mora_jax.training.optimizer import make_optimizer, make_schedule
from mora_jax.training.restarts import Restarter, Restarts
from mora_jax.training.runner import JitRunner
from mora_jax.training.state import Structure, flat_arrays, initial_state
from mora_jax.training.step import make_step

RANK, STEPS = 8, 1000
CONFIGS: dict[str, Any] = {
    "LoRA": mj.LoRAConfig(rank=RANK),
    "rsLoRA": mj.RsLoRAConfig(rank=RANK),
    "LoRA+": mj.LoRAPlusConfig(rank=RANK),
    "LoRA-FA": mj.LoRAFAConfig(rank=RANK),
    "DoRA": mj.DoRAConfig(rank=RANK),
    "PiSSA": mj.PiSSAConfig(rank=RANK),
    "OLoRA": mj.OLoRAConfig(rank=RANK),
    "VeRA": mj.VeRAConfig(),
    "AdaLoRA": mj.AdaLoRAConfig(),
    "IA³": mj.IA3Config(),
    "BitFit": mj.BitFitConfig(),
    "MoRA sharing": mj.MoRAConfig(rank=RANK, kind="sharing"),
    "MoRA rotation": mj.MoRAConfig(rank=RANK, kind="rotation"),
    "MoRA grouped": mj.MoRAConfig(rank=RANK, kind="grouped"),
    "MoRA grouped_tile": mj.MoRAConfig(rank=RANK, kind="grouped_tile"),
    "MoRA strided_interleave": mj.MoRAConfig(rank=RANK, kind="strided_interleave"),
    "MoRA decouple": mj.MoRAConfig(rank=RANK, kind="decouple"),
    "MoRA truncation": mj.MoRAConfig(rank=RANK, kind="truncation"),
    "MoRA sharing with DoRA's magnitude": mj.MoRAConfig(rank=RANK, kind="sharing", use_dora=True),
    "ReLoRA": mj.ReLoRAConfig(rank=RANK),
    "ReMoRA": mj.ReMoRAConfig(rank=RANK),
    "full": mj.FullConfig(),
}


class Contestant:
    """One method on the shared base.

    Args:
        base: graph and state of the base model; its arrays are used and not copied.
        config: of the method.
    """

    def __init__(self, base: tuple[nnx.GraphDef, nnx.State], config: Any):
        model = nnx.merge(*base)
        self.trainable = mj.attach(model, config, rngs=nnx.Rngs(0)).trainable
        graphdef, adapters, frozen = mj.partition(model)
        self.disk = disk_bytes(model)
        settings = OptimizerConfig(learning_rate=1e-5, schedule="constant", clip_norm=1.0)
        restarts = Restarts.of(config, STEPS)
        optimizer = make_optimizer(settings, STEPS, getattr(config, "rates", None), restarts=restarts)
        structure = Structure(graphdef, adapters, frozen)
        step = make_step(structure, optimizer, make_schedule(settings, STEPS, restarts))
        self.runner = JitRunner(step, make_mesh(1))
        self.state = self.runner.place(initial_state(flat_arrays(adapters), optimizer, 0))
        self.frozen = self.runner.place(flat_arrays(frozen))
        self.optimizer = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.optimizer))
        self.restarter = restarts and Restarter(structure, restarts, self.state, self.frozen)
        self.seconds: list[float] = []

    def step(self, batch: dict[str, np.ndarray]) -> float:
        """One optimiser step; returns its seconds."""
        placed = self.runner.place_batch(batch)
        jax.block_until_ready(placed)
        start = time.perf_counter()
        self.state, metrics = self.runner(self.state, self.frozen, placed)
        jax.block_until_ready(metrics.loss)
        return time.perf_counter() - start

    def restart_seconds(self) -> float | None:
        """What a restart takes once it is compiled; None for a method without restarts. The base is used up."""
        if self.restarter is None:
            return None
        # A restart donates the weights that it changes, which the other methods still need.
        self.frozen = {name: array.copy() for name, array in self.frozen.items()}
        for _ in range(2):
            start = time.perf_counter()
            self.state, self.frozen = self.restarter(self.state, self.frozen)
            jax.block_until_ready((self.state.step, self.frozen))
            seconds = time.perf_counter() - start
        return seconds

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of arguments and of temporary buffers, as compiled."""
        found = self.runner.compiled[0].memory_analysis()
        return found.argument_size_in_bytes, found.temp_size_in_bytes


def disk_bytes(model: Any) -> int | None:
    """Bytes of the adapter's file; None where the result is a model."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            mj.save_adapter(model, Path(folder) / "adapter")
            return (Path(folder) / "adapter" / "adapter_model.safetensors").stat().st_size
    except InputError:  # no such folder for this method
        return None


def table(contestants: dict[str, Contestant]) -> list[str]:
    """The table as Markdown."""
    lines = [
        "| method | trained parameters | adapter file, kB | step against LoRA's | median s | optimizer, MB | "
        "arguments, MB | temporary, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    peers = contestants["LoRA"].seconds
    for name, one in contestants.items():
        ratio = statistics.median(mine / peer for mine, peer in zip(one.seconds, peers, strict=True))
        arguments, temporary = (f"{size / 1e6:,.0f}" for size in one.memory)
        disk = "a whole model" if one.disk is None else f"{one.disk / 1e3:,.0f}"
        median = statistics.median(one.seconds)
        lines.append(
            f"| {name} | {one.trainable:,} | {disk} | {ratio:.2f} | {median:.2f} | {one.optimizer / 1e6:,.1f} | "
            f"{arguments} | {temporary} |"
        )
    return lines


def main() -> None:
    """Compiles all methods, times them in turns, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--dtype", help="of the base; none: the machine's default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--unroll", type=int, help="layers an iteration of the layer scan; none: the default")
    parser.add_argument("--only", nargs="+", default=list(CONFIGS), help="some of the methods, LoRA among them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "method_cost.md")
    args = parser.parse_args()
    missing = {method.config for method in METHODS.values()} - {type(config) for config in CONFIGS.values()}
    assert not missing, f"methods without a row: {missing}"

    ids = np.random.default_rng(0).integers(3, 40_000, (1, args.rows, args.length)).astype(np.int32)
    batch = {"input_ids": ids, "segment_ids": np.ones_like(ids), "weights": np.ones(ids.shape, np.float32)}
    model, _ = mj.load_pretrained(args.model, dtype=args.dtype, unroll=args.unroll)
    base, dtype = nnx.split(model), model.dtype.name
    contestants: dict[str, Contestant] = {}
    load = [os.getloadavg()[0]]
    for name in args.only:
        contestants[name] = Contestant(base, CONFIGS[name])
        print(f"{name}: first step, compiling included, {contestants[name].step(batch):.1f} s", flush=True)
    for number in range(args.rounds):
        names = list(contestants)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            contestants[name].seconds.append(contestants[name].step(batch))
        load.append(os.getloadavg()[0])
        print(f"round {number + 1} of {args.rounds}, load {load[-1]:.1f}", flush=True)
    restarts = {name: one.restart_seconds() for name, one in contestants.items()}
    tokens = f"{args.rows} × {args.length} tokens a step"
    text = [
        f"Printed by `python benchmarks/method_cost.py --model {Path(args.model).name} --rounds {args.rounds} "
        f"--rows {args.rows} --length {args.length}`",
        f"(jax {jax.__version__}, {jax.default_backend()}, {os.cpu_count()} cores, load average {min(load[1:]):.0f} to "
        f"{max(load[1:]):.0f}; {dtype} base, {tokens}, AdamW).",
        "The times of one machine under that load: the ratios are of steps of the same round.",
        "",
        *table(contestants),
        "",
        *(f"A restart of {name} takes {seconds:.2f} s once compiled." for name, seconds in restarts.items() if seconds),
    ]
    args.out.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
