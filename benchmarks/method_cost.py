"""What each method costs on one model: trained parameters, size on disk, time of a step, memory.

    python benchmarks/method_cost.py --model SmolLM2-135M-Instruct [--rounds 5] [--rows 1] [--length 128]

Methods adapt every linear layer at rank 8 (VeRA at its own 256; IA³ its own layers) and share one base in memory. Each
takes turns with LoRA in the same process, one step each a round, and its time is the median over the rounds of its time
over LoRA's in the same round, so that what else the machine does weighs on both. It is given by the clock and as CPU
time of all threads; on a machine that does other things too, the second is the one to trust. Memory is what the
compiler plans: the arguments of the step (base, trained arrays, optimizer, batch) and its temporary buffers. Writes a
Markdown table into `--out`, anew after each method.
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
from mora_jax.adapters.mora import KINDS
from mora_jax.errors import InputError
from mora_jax.training.assembly import assemble
from mora_jax.training.config import METHOD_KEYS, AdapterConfig, Config, OptimizerConfig
from mora_jax.training.restarts import Restarter
from mora_jax.training.setup import put_adapter

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
        self.trainable = put_adapter(model, config).trainable
        self.disk = disk_bytes(model)
        assembly = assemble(model, config, STEPS, (1, 1, 1))
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


def row(name: str, one: Contestant, ratios: tuple[float, float]) -> str:
    """A row of the table."""
    arguments, temporary = (f"{size / 1e6:,.0f}" for size in one.memory)
    disk = "none" if one.disk is None else f"{one.disk / 1e3:,.0f}"
    clock, cpu = ratios
    return (
        f"| {name} | {one.trainable:,} | {disk} | {cpu:.2f} | {clock:.2f} | {one.optimizer / 1e6:,.1f} | "
        f"{arguments} | {temporary} |"
    )


HEAD = (
    "| method | trained parameters | file, kB | CPU time of a step against LoRA's | by the clock | optimizer, MB | "
    "arguments, MB | temporary, MB |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def main() -> None:
    """Measures one method after the other, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--dtype", help="of the base; none: the machine's default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--unroll", type=int, help="layers an iteration of the layer scan; none: the default")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), help="some of the methods")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "method_cost.md")
    args = parser.parse_args()
    missing = set(METHOD_KEYS) - {settings["method"] for settings in METHODS.values()}
    assert not missing, f"methods without a row: {missing}"

    ids = np.random.default_rng(0).integers(3, 40_000, (1, args.rows, args.length)).astype(np.int32)
    batch = {"input_ids": ids, "segment_ids": np.ones_like(ids), "weights": np.ones(ids.shape, np.float32)}
    model, _ = mj.load_pretrained(args.model, dtype=args.dtype, unroll=args.unroll)
    base, dtype = nnx.split(model), model.dtype.name
    peer = Contestant(base, METHODS["LoRA"])
    peer.step(batch)
    rows, notes, loads, peer_seconds = [], [], [], []
    for name in args.only:
        one = Contestant(base, METHODS[name])
        first, _ = one.step(batch)
        pairs = []
        for number in range(args.rounds):
            pair = {}
            # Neither always goes first.
            for which in (peer, one) if number % 2 else (one, peer):
                pair[which] = which.step(batch)
            pairs.append([mine / other for mine, other in zip(pair[one], pair[peer], strict=True)])
            peer_seconds.append(pair[peer])
            loads.append(os.getloadavg()[0])
        clock, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append(row(name, one, (clock, cpu)))
        restart = one.restart_seconds()
        if restart is not None:
            notes.append(f"A restart of {name} takes {restart:.1f} s of CPU time once compiled.")
        print(f"{rows[-1]} (first step, compiling included: {first:.0f} s)", flush=True)
        seconds = [statistics.median(column) for column in zip(*peer_seconds, strict=True)]
        options = f"--rounds {args.rounds} --rows {args.rows} --length {args.length}"
        options += f" --unroll {args.unroll}" if args.unroll else ""
        text = [
            f"Printed by `python benchmarks/method_cost.py --model {Path(args.model).name} {options}`",
            f"(jax {jax.__version__}, {jax.default_backend()}, {os.cpu_count()} cores under a load of {min(loads):.0f} "
            f"to {max(loads):.0f}; {dtype} base, {args.rows} × {args.length} tokens a step, AdamW).",
            f"Medians of {args.rounds} rounds; a step of LoRA took {seconds[1]:.2f} s of CPU time, {seconds[0]:.2f} s "
            "by the clock.",
            "",
            *HEAD,
            *rows,
            "",
            *notes,
        ]
        args.out.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
        del one


if __name__ == "__main__":
    main()
