"""What each method costs on one model: trained parameters, size on disk, time of a step, memory.

    python benchmarks/method_cost.py --model SmolLM2-135M-Instruct [--rounds 5] [--rows 1] [--length 128]

Methods adapt every linear layer at rank 8 (VeRA at its own 256; IA³ its own layers) and share one base in memory. Each
takes turns with LoRA in the same process, one step each a round, and its time is the median over the rounds of its time
over LoRA's in the same round, so that what else the machine does weighs on both. It is given by the clock and as CPU
time of all threads; on a machine that does other things too, the second is the one to trust. Memory is what the
compiler plans: the arguments of the step (base, trained arrays, optimizer, batch) and its temporary buffers. Writes a
Markdown table into `--out`, rewritten after each method. Compiling all of them takes long: `--untimed` leaves out what
needs a compiled step, and `--keep` adds rows to the table of an earlier run.
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
from measuring import stamped, vocabulary, without_stamp

import mora_jax as mj
from mora_jax.adapters.methods.mora import KINDS
from mora_jax.errors import InputError
from mora_jax.training.build_step import assemble
from mora_jax.training.config.schema import METHOD_KEYS, AdapterConfig, Config, OptimizerConfig
from mora_jax.training.relora import Restarter
from mora_jax.training.setup import put_adapter
from mora_jax.training.sharding.mesh import make_mesh

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --out {table}"
QUICK = "--rows 1 --length 32 --rounds 1 --only LoRA 'MoRA sharing' full"
STEPS = 2000
# Rows of the table, and the keys of the section `adapter` that they mean.
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora"},
    "DoRA": {"method": "dora"},
    "MoRA sharing": {"method": "mora"},
    "MoRA rotation": {"method": "mora", "kind": "rotation"},
    "MoRA sharing with DoRA's magnitude": {"method": "mora", "use_dora": True},
    "ReLoRA": {"method": "relora"},
    "ReMoRA": {"method": "remora"},
    "PiSSA": {"method": "pissa"},
    "LoRA-FA": {"method": "lora_fa"},
    "VeRA": {"method": "vera", "rank": 256},
    "AdaLoRA": {"method": "adalora"},
    "IA³": {"method": "ia3"},
    "BitFit": {"method": "bitfit"},
    "full": {"method": "full"},
    "LoRA+": {"method": "lora_plus"},
    "rsLoRA": {"method": "rslora"},
    "OLoRA": {"method": "olora"},
    **{f"MoRA {kind}": {"method": "mora", "kind": kind} for kind in KINDS if kind not in ("sharing", "rotation")},
}
METHODS |= {
    name: {"method": name} for name in METHOD_KEYS if {"method": name} not in METHODS.values() and name != "vera"
}


class Contestant:
    """One method on the shared base.

    Args:
        base: graph and state of the base model; its arrays are used and not copied.
        settings: keys of the section `adapter`.
    """

    def __init__(self, base: tuple[nnx.GraphDef, nnx.State], settings: dict[str, Any]):
        optimizer = OptimizerConfig(learning_rate=1e-5, schedule="constant")
        config = Config(adapter=AdapterConfig(**settings), optimizer=optimizer)
        model = nnx.merge(*base)
        self.trainable = put_adapter(model, config, STEPS).trainable
        self.disk = disk_bytes(model)
        assembly = assemble(model, config, STEPS, make_mesh(1))
        self.runner: Any = assembly.runner
        # Steps donate their state; masters of a float32 base would be the base itself.
        trained = {name: array.copy() for name, array in assembly.adapters.items()}
        self.state = self.runner.place(assembly._replace(adapters=trained).initial_state(0))
        self.frozen = self.runner.place(assembly.frozen)
        self.optimizer = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.optimizer))
        restarts = assembly.restarts
        self.restarter = restarts and Restarter(assembly.structure, restarts, self.state, self.frozen)

    def step(self, batch: dict[str, np.ndarray]) -> tuple[float, float]:
        """One optimiser step; returns its seconds by the clock and of CPU time."""
        placed = self.runner.place_batch(batch)
        jax.block_until_ready(placed)
        start = time.perf_counter(), time.process_time()
        self.state, metrics = self.runner(self.state, self.frozen, placed)
        jax.block_until_ready((metrics, self.state))
        return time.perf_counter() - start[0], time.process_time() - start[1]

    def restart_seconds(self) -> float | None:
        """CPU time of a restart that is compiled already; None for a method without restarts."""
        if self.restarter is None:
            return None
        # A restart donates the weights that it changes, which the other methods still need.
        self.frozen = {name: array.copy() for name, array in self.frozen.items()}
        for _ in range(2):
            start = time.process_time()
            self.state, self.frozen = self.restarter(self.state, self.frozen)
            jax.block_until_ready((self.state.step, self.frozen))
            seconds = time.process_time() - start
        return seconds

    @property
    def fixed(self) -> tuple[str, ...]:
        """The cells that need no compiled step: trained parameters, kB on disk, MB of the optimizer."""
        disk = "none" if self.disk is None else f"{self.disk / 1e3:,.0f}"
        return f"{self.trainable:,}", disk, f"{self.optimizer / 1e6:,.1f}"

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


HEAD = (
    "| method | trained parameters | file, kB | optimizer, MB | CPU time of a step against LoRA's | by the clock | "
    "arguments, MB | temporary, MB |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


class Timing:
    """Steps beside LoRA's.

    Args:
        peer: LoRA.
        batch: of every step.
        rounds: steps of each.
    """

    def __init__(self, peer: Contestant, batch: dict[str, np.ndarray], rounds: int):
        self.peer, self.batch, self.rounds = peer, batch, rounds
        peer.step(batch)
        self.seconds: list[tuple[float, float]] = []
        self.loads: list[float] = []

    def cells(self, one: Contestant) -> tuple[str, ...]:
        """The cells of the table that need a compiled step."""
        one.step(self.batch)
        pairs = []
        for number in range(self.rounds):
            # Neither always goes first.
            pair = {which: which.step(self.batch) for which in ((self.peer, one) if number % 2 else (one, self.peer))}
            pairs.append([mine / other for mine, other in zip(pair[one], pair[self.peer], strict=True)])
            self.seconds.append(pair[self.peer])
            self.loads.append(os.getloadavg()[0])
        clock, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        return f"{cpu:.2f}", f"{clock:.2f}", *(f"{size / 1e6:,.0f}" for size in one.memory)

    def note(self) -> str:
        """How it was measured."""
        clock, cpu = (statistics.median(column) for column in zip(*self.seconds, strict=True))
        return (
            f"Medians of {self.rounds} rounds under a load of {min(self.loads):.0f} to {max(self.loads):.0f}; a step "
            f"of LoRA took {cpu:.2f} s of CPU time, {clock:.2f} s by the clock."
        )


def main() -> None:
    """Measures one method after the other, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--dtype", help="of the base; none: the machine's default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), help="some of the methods")
    parser.add_argument("--untimed", action="store_true", help="compile nothing")
    parser.add_argument("--keep", action="store_true", help="keep what an earlier run wrote of other methods")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "method_cost.md")
    args = parser.parse_args()

    ids = np.random.default_rng(0).integers(3, vocabulary(args.model), (1, args.rows, args.length)).astype(np.int32)
    batch = {"input_ids": ids, "segment_ids": np.ones_like(ids), "weights": np.ones(ids.shape, np.float32)}
    model, _ = mj.load_pretrained(args.model, dtype=args.dtype)
    base, dtype = nnx.split(model), model.dtype.name
    rows, notes = earlier(args.out) if args.keep else ({}, [])
    before = args.out.read_text(encoding="utf-8") if args.keep else ""
    options = f"--rounds {args.rounds} --rows {args.rows} --length {args.length}"
    title = [
        f"Printed by `python benchmarks/method_cost.py --model {Path(args.model).name} {options}`",
        f"(jax {jax.__version__}, {jax.default_backend()}, {os.cpu_count()} cores; {dtype} base, {args.rows} × "
        f"{args.length} tokens a step, AdamW).",
    ]
    timing = None if args.untimed else Timing(Contestant(base, METHODS["LoRA"]), batch, args.rounds)
    for name in args.only:
        one = timing.peer if timing is not None and name == "LoRA" else Contestant(base, METHODS[name])
        timed = ("",) * 4 if timing is None else timing.cells(one)
        rows[name] = f"| {' | '.join((name, *one.fixed, *timed))} |"
        print(rows[name], flush=True)
        restart = None if timing is None else one.restart_seconds()
        if restart is not None:
            notes.append(f"A restart of {name} takes {restart:.1f} s of CPU time once compiled.")
        said = notes if timing is None else [*notes, timing.note()]
        table = [rows[name] for name in METHODS if name in rows]
        text = stamped("\n".join([*title, "", *HEAD, *table, "", *said]), before)
        args.out.write_text(text, encoding="utf-8")
        del one


def earlier(path: Path) -> tuple[dict[str, str], list[str]]:
    """The rows of a table by method, and the notes below it."""
    _, _, rest = without_stamp(path.read_text(encoding="utf-8")).partition(HEAD[1] + "\n")
    lines = rest.splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}
    return rows, [line for line in lines if line and not line.startswith("|")]


if __name__ == "__main__":
    main()
