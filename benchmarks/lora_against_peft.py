"""Our step against PEFT + torch, in one process on the same cores, with the same tokens and the same start.

    python benchmarks/lora_against_peft.py --model SmolLM2-135M-Instruct [--repetitions 5] [--threads 1 2]
        [--methods lora dora mora full] [--dtypes float32 bfloat16]

First both train a few float32 steps from the same adapter, and the losses are printed side by side: they must agree.
Then the contestants take turns, one step each a round, on otherwise idle cores; the table gives medians of the rounds
with their spread. LoRA, DoRA and full fine-tuning are those of both libraries; MoRA is only ours.
torch is timed at each number of threads that `--threads` names, and its best counts. Its full fine-tuning in bfloat16
keeps weights and moments in bfloat16; ours keeps them in float32 and uses them in bfloat16, as torch does under
autocast. Needs torch and peft (the extra `peers`).
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
from measuring import Turn, save, table, take_turns, vocabulary
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import mora_jax as mj
from mora_jax.training.config.schema import OptimizerConfig
from mora_jax.training.optimizer import make_optimizer, make_schedule
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.runner import JitRunner
from mora_jax.training.state import Structure, flat_arrays, initial_state
from mora_jax.training.step import make_step

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --json {json} --methods lora dora mora full"
QUICK = "--rows 1 --length 32 --repetitions 2"
RATE = 1e-3
DTYPES = ("float32", "bfloat16")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
    """PEFT + torch at one dtype: from an adapter's folder, with a fresh adapter, or with None all of the model.

    With `autocast` weights of that dtype are used in bfloat16, which is what our full fine-tuning in bfloat16 does.
    """

    def __init__(
        self, folder: str, dtype: torch.dtype, adapter: Path | LoraConfig | None, threads: int, autocast: bool = False
    ):
        self.threads, self.autocast = threads, autocast
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if isinstance(adapter, Path):
            self.model = PeftModel.from_pretrained(self.model, str(adapter), is_trainable=True)
        elif adapter is not None:
            self.model = get_peft_model(self.model, adapter)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step(self, ids: np.ndarray) -> float:
        """One optimiser step on `ids [B, T]`; returns the loss."""
        torch.set_num_threads(self.threads)
        tokens = torch.tensor(ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
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


def makers(args: argparse.Namespace, lora: Any, adapter: Path) -> dict[str, Callable[[], Any]]:
    """What makes each contestant."""
    found: dict[str, Callable[[], Any]] = {}
    dora = LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules=LINEAR, use_dora=True
    )
    ours = {"lora": ("LoRA", lora), "dora": ("DoRA", mj.DoRAConfig(rank=args.rank)), "full": ("full", mj.FullConfig())}
    theirs = {"lora": ("PEFT LoRA", adapter), "dora": ("PEFT DoRA", dora), "full": ("torch full", None)}
    for method in args.methods:
        for threads in args.threads if method in theirs else ():
            for dtype in args.dtypes:
                name, start = theirs[method]
                found[f"{name}, {dtype}, {threads} threads"] = lambda d=dtype, t=threads, start=start: Peft(
                    args.model, getattr(torch, d), start, t
                )
            if method == "full" and "bfloat16" in args.dtypes:
                found[f"torch full, float32 used in bfloat16, {threads} threads"] = lambda t=threads: Peft(
                    args.model, torch.float32, None, t, autocast=True
                )
        for dtype in args.dtypes if method in ours else ():
            name, config = ours[method]
            found[f"mora_jax {name}, {dtype}"] = lambda d=dtype, c=config: Ours(args.model, c, d)
        for kind in ("sharing", "rotation") if method == "mora" else ():
            config = mj.MoRAConfig(rank=args.rank, kind=kind)
            for dtype in args.dtypes:
                found[f"mora_jax MoRA {kind}, {dtype}"] = lambda d=dtype, c=config: Ours(args.model, c, d)
    return found


def main() -> None:
    """Compares losses, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--methods", nargs="+", choices=("lora", "dora", "mora", "full"), default=["lora", "mora"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="those to compare")
    parser.add_argument("--json", type=Path, help="also write the times of each round here")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    batches = [rng.integers(3, vocabulary(args.model), (args.rows, args.length)) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        model, _ = mj.load_pretrained(args.model, dtype="float32")
        lora = mj.LoRAConfig(rank=args.rank, alpha=2 * args.rank)
        mj.attach(model, lora, rngs=nnx.Rngs(0))
        mj.save_adapter(model, adapter, base_model_name_or_path=args.model)
        del model
        compare_losses(args, adapter, batches)
        contestants = {name: make() for name, make in makers(args, lora, adapter).items()}

    def turn(one: Any) -> Turn:
        def step(number: int) -> None:
            one.step(batches[number % len(batches)])

        return step

    times = take_turns({name: turn(one) for name, one in contestants.items()}, args.repetitions)
    tokens = args.rows * args.length
    rates = {name: tokens / taken.median for name, taken in times.items()}
    peer = max((rate for name, rate in rates.items() if name.startswith("PEFT LoRA, float32")), default=0.0)
    rows = []
    for name, taken in times.items():
        one = contestants[name]
        host = f"{1e3 * statistics.median(one.host_seconds[1:]):.2f}" if isinstance(one, Ours) else ""
        against = f"{rates[name] / peer:.2f}" if peer else ""
        cells = [f"{one.trainable:,}", f"{taken.median:.3g}", taken.spread, f"{rates[name]:.0f}", against]
        rows.append([name, *cells, f"{taken.median_cpu:.3g}", host])
    columns = ["step", "trained parameters", "median s", "least to most", "tokens/s", "against PEFT LoRA float32"]
    print(table([*columns, "CPU s", "host ms"], 1, rows))
    print(f"\n{args.rows} × {args.length} tokens a step")
    save(args.json, times)


if __name__ == "__main__":
    main()
