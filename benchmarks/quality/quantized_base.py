"""LoRA on a base held as it is, in int8 and in nf4: losses, memory, time and answers of one short run each.

    python benchmarks/quality/quantized_base.py --model SmolLM2-135M-Instruct --data alpagasus_dolly_3k.json \\
        --out runs/quantized --table benchmarks/results/quantized_base.md

Runs `mora-jax train` once a row (a row that has a summary already is kept), scores the base before, and the adapter on
the exact weights after: what `mora-jax merge` would give. The last rows of the data are held out.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mora_jax as mj
from benchmarks.measuring import stamped
from mora_jax.interop import load_pretrained

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --data {data} --out {work} --table {table}"
QUICK = "--steps 3 --max-length 32"
HELD = ("none", "int8", "nf4")
PROMPTS = (
    "What is the capital of Japan, and what is it known for?",
    "Classify each as fruit or vegetable: apple, carrot, banana, spinach.",
)
HELD_OUT = 32
ROUNDS = 5


def command(*words: Any) -> str:
    """Runs mora-jax; returns what it prints."""
    line = [sys.executable, "-m", "mora_jax", *map(str, words)]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def train(args: argparse.Namespace, held: str, out: Path) -> dict[str, Any]:
    """One run, or the summary of the run that is there."""
    if not (out / "summary.json").is_file():
        keys = {
            "model.path": args.model,
            "model.dtype": "float32",
            "model.quantize": held,
            "data.train": args.out / "train.json",
            "data.eval": args.out / "eval.json",
            "data.max_length": args.max_length,
            "train.steps": args.steps,
            "train.batch_size": 4,
            "adapter.rank": 8,
            "optimizer.learning_rate": 5e-4,
            "optimizer.warmup_steps": 3,
            "out": out,
        }
        command("train", "--overwrite", *(f"--config.{name}={value}" for name, value in keys.items()))
    return json.loads((out / "summary.json").read_text())


def evaluate(args: argparse.Namespace, held: str, adapter: Path | None = None) -> float:
    """Loss on the rows held out, in nats a token of the answers."""
    words = ["--model", args.model, "--dtype", "float32", "--quantize", held, "--data", args.out / "eval.json"]
    words += ["--max-length", args.max_length, "--json"]
    return json.loads(command("eval", *words, *(["--adapter", adapter] if adapter else [])))["nll"]


def answer(args: argparse.Namespace, held: str, adapter: Path, prompt: str) -> str:
    """The likeliest answer."""
    words = ["--model", args.model, "--quantize", held, "--adapter", adapter, "--prompt", prompt]
    return command("generate", *words, "--max-new-tokens", 48).strip()


def megabytes(args: argparse.Namespace, held: str) -> tuple[float, float]:
    """Of the base's layers, and of all of it."""
    model, _ = load_pretrained(args.model, dtype="float32", quantize=held)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(part))) for part in (model.layers, model)]
    return sizes[0] / 1e6, sizes[1] / 1e6


def seconds(args: argparse.Namespace) -> dict[str, float]:
    """Of the layers' forward and backward pass with a full batch: the fastest of some, taken in turn."""
    ids = np.random.default_rng(0).integers(0, 1000, (4, args.max_length))
    calls = {}
    for held in HELD:
        model, _ = load_pretrained(args.model, dtype="float32", quantize=held)
        mj.attach(model, mj.LoRAConfig(rank=8), rngs=nnx.Rngs(0))
        graphdef, adapters, frozen = mj.partition(model)

        def loss(adapters: Any, frozen: Any, graphdef: Any = graphdef) -> jax.Array:
            return jnp.mean(jnp.square(nnx.merge(graphdef, adapters, frozen).hidden(ids)))

        calls[held] = partial(jax.jit(jax.grad(loss)), adapters, frozen)
        jax.block_until_ready(calls[held]())
    times: dict[str, float] = {}
    for _ in range(ROUNDS):
        for held, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[held] = min(times.get(held, math.inf), time.perf_counter() - start)
    return times


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--data", type=Path, required=True, help="an instruction file, a JSON list or lines of JSON")
    parser.add_argument("--out", type=Path, default=Path("runs/quantized"))
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max-length", type=int, default=256)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    text = args.data.read_text(encoding="utf-8")
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    (args.out / "train.json").write_text(json.dumps(rows[:-HELD_OUT]))
    (args.out / "eval.json").write_text(json.dumps(rows[-HELD_OUT:]))
    lines = [
        "# A quantised base",
        "",
        f"{Path(args.model).name} in float32, LoRA of rank 8 on all linear layers, {args.steps} steps of 4 rows of at "
        f"most {args.max_length} tokens",
        f"of {args.data.name}, one seed, {jax.devices()[0].platform.upper()}. Losses are of the answers of {HELD_OUT} "
        "rows held out, in nats a token;",
        "*on exact weights* is the adapter on the base as the files have it, which is what merging gives; *s, layers*",
        f"the fastest of {ROUNDS} forward and backward passes through the layers, in a loop, with 4 full rows. Written",
        "by `python benchmarks/quality/quantized_base.py`.",
        "",
        "| `model.quantize` | layers, MB | base, MB | loss before | loss after | after, on exact weights | s, layers |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    answers, times = [], seconds(args)
    for held in HELD:
        out = args.out / held
        summary = train(args, held, out)
        layers, base = megabytes(args, held)
        before = evaluate(args, held)
        exact = summary["eval_loss"] if held == "none" else evaluate(args, "none", out)
        lines.append(
            f"| {held} | {layers:.0f} | {base:.0f} | {before:.4f} | {summary['eval_loss']:.4f} | {exact:.4f} | "
            f"{times[held]:.2f} |"
        )
        print(lines[-1], flush=True)
        answers += [f"\n## Answers, {held}", *(f"\n> {p}\n\n{answer(args, held, out, p)}" for p in PROMPTS)]
    text = "\n".join([*lines, *answers]) + "\n"
    if args.table:
        args.table.write_text(stamped(text), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
