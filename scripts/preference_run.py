"""DPO on pairs of answers: LoRA beside MoRA from one base, rates tuned on pairs and a seed of their own.

    python scripts/preference_run.py SmolLM2-135M-Instruct pairs.json runs/preferences --rates 1e-4 5e-4 --seeds 3

The pairs are split once: held-out ones, which are scored at the end alone, tuning ones, by whose loss each method's
rate is chosen, and the rest, for training. Pairs of which nothing to train is left within `--max-length` fall away.
It prints reward accuracy and margin with their standard errors over pairs, and what was forgotten beside it: the loss
of plain texts (`--texts`) after training less before. A seed draws the adapter and the order of the pairs. A stopped
comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import mora_jax as mj
from mora_jax.data import EncodedDataset, load_rows
from mora_jax.evaluation.perplexity import score

BATCH_SIZE = 4
TUNING_SEED = 1000
METHODS = {"lora": mj.LoRAConfig(rank=8), "mora": mj.MoRAConfig(rank=8, kind="rotation")}
SCORES = ("reward_accuracy", "margin", "loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", required=True, help="of which each method gets the best")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--held-out", type=int, default=60, help="how many pairs")
    parser.add_argument("--tuning", type=int, default=40, help="how many pairs")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--texts", help="a file of plain text, scored before and after")
    args = parser.parse_args()
    rows = json.loads(Path(args.pairs).read_text())
    order = np.random.default_rng(0).permutation(len(rows))
    parts = np.split(order, [args.held_out, args.held_out + args.tuning])
    held_out, tuning, train = ([rows[number] for number in part] for part in parts)
    texts = None
    if args.texts is not None:
        model, tokenizer = mj.load_pretrained(args.model, dtype="float32")
        texts = plain_texts(args.texts, tokenizer, args.max_length)
        before = score(model, texts, batch_size=8).nll

    def run(method: str, rate: float, seed: int, scored: list) -> dict:
        """One run's last metrics, which a file beside it keeps."""
        folder = args.out / f"{method}-{rate:g}-{seed}"
        summary = args.out / f"{folder.name}.json"
        if summary.exists():
            return json.loads(summary.read_text())
        result = mj.finetune(
            args.model,
            train,
            METHODS[method],
            loss="dpo",
            eval_rows=scored,
            steps=args.steps,
            batch_size=BATCH_SIZE,
            learning_rate=rate,
            out=folder,
            config={
                "seed": seed,
                "model.dtype": "float32",
                "data.max_length": args.max_length,
                "data.cache": str(args.out / "tokens"),
                "loss.reference": "cached",
                "optimizer.warmup_steps": args.steps // 10,
                "train.eval_on_start": False,
            },
            overwrite=True,
        )
        line = {"method": method, "rate": rate, "seed": seed} | result.metrics[-1]
        if texts is not None:
            line["forgotten"] = score(result.model, texts, batch_size=8).nll - before
        summary.write_text(json.dumps(line))
        print(json.dumps(line), flush=True)
        return line

    tuned = [run(method, rate, TUNING_SEED, tuning) for rate in args.rates for method in METHODS]
    best = {
        method: min((x for x in tuned if x["method"] == method), key=lambda x: x["eval_loss"])["rate"]
        for method in METHODS
    }
    final = [run(method, best[method], seed, held_out) for seed in range(args.seeds) for method in METHODS]
    for title, lines in (("tuning pairs", tuned), ("held-out pairs", final)):
        print(f"\n{title}\n\n{table(lines)}")


def table(lines: list[dict]) -> str:
    """A row a run, in Markdown."""
    head = ["method", "rate", "seed", *(name.replace("_", " ") for name in SCORES), "loss of texts, nats a token"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for line in lines:
        scores = [f"{line[f'eval_{name}']:.3f} ± {line[f'eval_{name}_stderr']:.3f}" for name in SCORES]
        forgotten = f"{line['forgotten']:+.4f}" if "forgotten" in line else "-"
        rows.append([line["method"], f"{line['rate']:g}", str(line["seed"]), *scores, forgotten])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plain_texts(path: str, tokenizer, max_length: int) -> EncodedDataset:
    """The first paragraphs of a file."""
    rows = [row for row in load_rows(path, format="text") if len(str(row)) > 200][:32]
    return EncodedDataset.build(rows, tokenizer, mode="full", max_length=max_length)


if __name__ == "__main__":
    main()
