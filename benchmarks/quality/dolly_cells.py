"""LoRA, MoRA and full fine-tuning of a real model on a real instruction file, each masked and unmasked.

    python benchmarks/quality/dolly_cells.py --model SmolLM2-135M-Instruct --data dolly.json --out runs/dolly

Runs `mora-jax train` once a cell (a cell that has a summary already is kept, so an interrupted comparison goes on),
answers three prompts with the base and with every adapter, and writes `cells.md` and `curves.png` into `--out`.
One seed and learning rates that were not searched: the table shows that the cells work and what they cost, not which
method is best.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from mora_jax.evaluation.chat import generate_batch
from mora_jax.evaluation.perplexity import score
from mora_jax.interop import load_adapter, load_pretrained
from mora_jax.training.config.load import load_config
from mora_jax.training.setup import prepare

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --data {data} --out {work}"
QUICK = "--steps 5 --max-length 64 --max-new-tokens 4 --methods lora --modes masked"
NEEDS = ("matplotlib",)

PROMPTS = (
    "What is the capital of Japan, and what is it known for?",
    "Give me three tips for sleeping better.",
    "Classify each as fruit or vegetable: apple, carrot, banana, spinach.",
)
METHODS = {
    "lora": (["method=lora", "rank=8"], 5e-4),
    "mora-sharing": (["method=mora", "rank=8", "kind=sharing"], 2e-4),
    "mora-rotation": (["method=mora", "rank=8", "kind=rotation"], 7e-4),
    "full": (["method=full"], 5e-5),
}
MODES = ("masked", "unmasked")


def settings(args: argparse.Namespace, name: str, mode: str, out: Path) -> list[str]:
    """A cell's configuration, as `key=value`."""
    keys, rate = METHODS[name]
    return [
        f"model.path={args.model}",
        f"data.train={args.data}",
        f"out={out}",
        *(f"adapter.{key}" for key in keys),
        f"loss.mode={mode}",
        f"data.max_length={args.max_length}",
        "data.eval_fraction=0.03",
        f"train.steps={args.steps}",
        "train.batch_size=4",
        f"optimizer.learning_rate={rate}",
        "optimizer.warmup_steps=5",
        "seed=0",
    ]


def train(args: argparse.Namespace, name: str, mode: str, out: Path) -> None:
    """Runs one cell with the command line."""
    command = [sys.executable, "-m", "mora_jax", "train", "--overwrite"]
    subprocess.run([*command, *(f"--config.{setting}" for setting in settings(args, name, mode, out))], check=True)


def base_perplexity(args: argparse.Namespace) -> float:
    """Of the held-out answers, before any training: a fresh adapter changes nothing."""
    pairs = [setting.split("=", 1) for setting in settings(args, "lora", "masked", args.out / "base")]
    config, _ = load_config(None, [(name, value) for name, value in pairs])
    setup = prepare(config)
    assert setup.evaluation is not None
    return score(setup.model, setup.evaluation, batch_size=4).perplexity


def answers(args: argparse.Namespace, out: Path | None) -> list[str]:
    """Greedy answers of the base, or of a cell, to the three prompts."""
    folder = out / "model" if out is not None and (out / "model").is_dir() else args.model
    model, tokenizer = load_pretrained(folder, dtype="float32")
    if out is not None and (out / "adapter").is_dir():
        load_adapter(model, out / "adapter")
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return generate_batch(model, tokenizer, conversations, max_new_tokens=args.max_new_tokens)


def losses(out: Path) -> list[tuple[int, float]]:
    """The training loss by step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def table(args: argparse.Namespace, cells: dict[tuple[str, str], Path]) -> str:
    """One Markdown row a cell."""
    lines = [
        f"Held-out response perplexity of the base: {base_perplexity(args):.3f}.",
        "",
        "| method | loss on | trained parameters | final loss | held-out response perplexity | tokens/s | peak GB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, mode), out in cells.items():
        s = json.loads((out / "summary.json").read_text())
        lines.append(
            f"| {name} | {mode} | {s['trainable_parameters']:,} | {s['final_loss']:.3f} | "
            f"{s['eval_perplexity']:.3f} | {s['tokens_per_second']:.0f} | {s['peak_memory_bytes'] / 1e9:.1f} |"
        )
    return "\n".join(lines)


def plot(cells: dict[tuple[str, str], Path], file: Path) -> None:
    """Training loss of every cell, smoothed over five steps; one panel a loss mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = [mode for mode in MODES if any(cell[1] == mode for cell in cells)]
    figure, grid = plt.subplots(1, len(modes), squeeze=False, figsize=(10, 4), sharey=True, layout="constrained")
    styles = {"lora": "C0-", "mora-sharing": "C1--", "mora-rotation": "C2-.", "full": "k:"}
    axes = grid[0]
    for axis, mode in zip(axes, modes, strict=True):
        for name in METHODS:
            if (name, mode) not in cells:
                continue
            steps, values = zip(*losses(cells[name, mode]), strict=True)
            smooth = [sum(values[max(0, i - 4) : i + 1]) / (i + 1 - max(0, i - 4)) for i in range(len(values))]
            axis.plot(steps, smooth, styles[name], label=name, linewidth=1.8)
        axis.set(title=f"{mode} loss", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("training loss (nats a trained token, mean of 5 steps)")
    axes[0].legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Runs what is missing and writes the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--data", required=True, help="an instruction file")
    parser.add_argument("--out", type=Path, default=Path("runs/dolly"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--report", action="store_true", help="train nothing; report the cells that are finished")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    cells = {}
    for mode in args.modes:
        for name in args.methods:
            out = args.out / f"{name}-{mode}"
            if not (out / "summary.json").is_file():
                if args.report:
                    continue
                train(args, name, mode, out)
            cells[name, mode] = out
    parts = [table(args, cells)]
    for title, out in [("base", None), *((" ".join(cell), path) for cell, path in cells.items())]:
        parts.append(f"### {title}")
        for prompt, text in zip(PROMPTS, answers(args, out), strict=True):
            parts.append(f"> {prompt}\n\n{text.strip()}")
    plot(cells, args.out / "curves.png")
    (args.out / "cells.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(parts[0])


if __name__ == "__main__":
    main()
