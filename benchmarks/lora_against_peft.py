"""Our LoRA step against PEFT + torch, in one process on the same cores, with the same tokens and the same start.

    python benchmarks/lora_against_peft.py --model SmolLM2-135M-Instruct [--repetitions 5] [--threads 1 2]

First both train a few float32 steps from the same adapter, and the losses are printed side by side: they must agree.
Then the contestants take turns, one step each a round, on otherwise idle cores; the table gives medians of the rounds.
torch is timed at each number of threads that `--threads` names, and its best counts. Needs torch and peft (the extra
`test`).
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from peft import PeftModel
from transformers import AutoModelForCausalLM

import mora_jax as mj
from mora_jax.training.config.schema import OptimizerConfig
from mora_jax.training.optimizer import make_optimizer, make_schedule
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.runner import JitRunner
from mora_jax.training.state import Structure, flat_arrays, initial_state
from mora_jax.training.step import make_step

RATE = 1e-3


class Ours:
    """One of our methods at one dtype."""

    def __init__(self, folder: str, config: Any, dtype: str, adapter: Path | None = None):
        self.model, _ = mj.load_pretrained(folder, dtype=dtype)
        if adapter is None:
            report = mj.attach(self.model, config, rngs=nnx.Rngs(0))
            self.trainable = report.trainable
        else:
            mj.load_adapter(self.model, adapter)
        graphdef, adapters, frozen = mj.partition(self.model)
        settings = OptimizerConfig(learning_rate=RATE, schedule="constant", clip_norm=None)
        optimizer, schedule = make_optimizer(settings, 1000), make_schedule(settings, 1000)
        step = make_step(Structure(graphdef, adapters, frozen), optimizer, schedule)
        self.runner = JitRunner(step, make_mesh(1))
        self.state = self.runner.place(initial_state(flat_arrays(adapters), optimizer, 0))
        self.frozen = self.runner.place(flat_arrays(frozen))
        self.host_seconds: list[float] = []

    def step(self, ids: np.ndarray) -> float:
        """One optimiser step on `ids [B, T]`; returns the loss."""
        rows = ids[None].astype(np.int32)
        batch = {"input_ids": rows, "segment_ids": np.ones_like(rows), "weights": np.ones(rows.shape, np.float32)}
        placed = self.runner.place_batch(batch)
        jax.block_until_ready(placed)
        start = time.perf_counter()
        self.state, metrics = self.runner(self.state, self.frozen, placed)
        self.host_seconds.append(time.perf_counter() - start)
        return float(metrics.loss)


class Peft:
    """PEFT + torch at one dtype, from the same adapter."""

    def __init__(self, folder: str, dtype: torch.dtype, adapter: Path, threads: int):
        self.threads = threads
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step(self, ids: np.ndarray) -> float:
        """One optimiser step on `ids [B, T]`; returns the loss."""
        torch.set_num_threads(self.threads)
        tokens = torch.tensor(ids)
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def compare_losses(args: argparse.Namespace, adapter: Path, batches: list[np.ndarray]) -> None:
    """Both in float32 from the same adapter: prints the losses and the largest difference."""
    ours, peft = Ours(args.model, None, "float32", adapter), Peft(args.model, torch.float32, adapter, args.threads[-1])
    print("step   mora_jax float32   PEFT float32")
    largest = 0.0
    for number, ids in enumerate(batches, 1):
        a, b = ours.step(ids), peft.step(ids)
        largest = max(largest, abs(a - b) / abs(b))
        print(f"{number:4}   {a:16.6f}   {b:12.6f}")
    print(f"largest relative difference {largest:.1e}\n", flush=True)


def main() -> None:
    """Compares losses, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    batches = [rng.integers(3, 40_000, (args.rows, args.length)) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        model, _ = mj.load_pretrained(args.model, dtype="float32")
        lora = mj.LoRAConfig(rank=args.rank, alpha=2 * args.rank)
        trainable = mj.attach(model, lora, rngs=nnx.Rngs(0)).trainable
        mj.save_adapter(model, adapter, base_model_name_or_path=args.model)
        del model
        compare_losses(args, adapter, batches)
        makers: dict[str, Callable[[], Any]] = {}
        for threads in args.threads:
            for dtype in ("float32", "bfloat16"):
                makers[f"PEFT LoRA, {dtype}, {threads} threads"] = lambda d=dtype, t=threads: Peft(
                    args.model, getattr(torch, d), adapter, t
                )
        for dtype in ("float32", "bfloat16"):
            makers[f"mora_jax LoRA, {dtype}"] = lambda d=dtype: Ours(args.model, lora, d)
        for kind in ("sharing", "rotation"):
            config = mj.MoRAConfig(rank=args.rank, kind=kind)
            makers[f"mora_jax MoRA {kind}, bfloat16"] = lambda c=config: Ours(args.model, c, "bfloat16")
        contestants = {name: make() for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(args.repetitions + 1):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            contestant.step(batches[repetition % len(batches)])
            if repetition:  # the first round compiles and warms up
                times[name].append(time.perf_counter() - start)
    tokens = args.rows * args.length
    rates = {name: tokens / statistics.median(seconds) for name, seconds in times.items()}
    peer = max(rate for name, rate in rates.items() if name.startswith("PEFT LoRA, float32"))
    print("| step | trained parameters | median s | tokens/s | against PEFT float32 | host ms |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, rate in rates.items():
        contestant = contestants[name]
        host = f"{1e3 * statistics.median(contestant.host_seconds[1:]):.2f}" if isinstance(contestant, Ours) else ""
        count = getattr(contestant, "trainable", trainable)
        print(f"| {name} | {count:,} | {tokens / rate:.2f} | {rate:.0f} | {rate / peer:.2f} | {host} |")
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    extras = ", ".join(fast) or "no bfloat16 instructions"
    print(f"\n{os.cpu_count()} cores, {extras}; {args.rows} × {args.length} tokens a step")


if __name__ == "__main__":
    main()
