"""DPO on pairs of answers: LoRA beside MoRA, from one base, on the same pairs, with a part of them held out.

    python scripts/preference_run.py SmolLM2-135M-Instruct pairs.json runs/preferences --seeds 1

Runs one after the other in this process. It prints reward accuracy and margin on the held-out pairs with their
standard errors over pairs, and what was forgotten beside it, the loss of plain texts (`--texts`) after training less
before. A seed draws the adapter and the order of the pairs; which pairs are held out stays the same.
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
METHODS = {"lora": mj.LoRAConfig(rank=8), "mora": mj.MoRAConfig(rank=8, kind="rotation")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=60, help="how many pairs")
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--rate", action="append", metavar="METHOD=RATE", default=[])
    parser.add_argument("--texts", help="a file of plain text, scored before and after")
    args = parser.parse_args()
    rows = json.loads(Path(args.pairs).read_text())
    order = np.random.default_rng(0).permutation(len(rows))
    held_out, train = ([rows[number] for number in part] for part in np.split(order, [args.held_out]))
    train = train[: args.steps * BATCH_SIZE]  # each pair once
    rates = {"lora": 5e-5, "mora": 5e-5} | {name: float(rate) for name, rate in (x.split("=") for x in args.rate)}
    model, tokenizer = mj.load_pretrained(args.model, dtype="float32")
    texts = None if args.texts is None else plain_texts(args.texts, tokenizer, args.max_length)
    before = None if texts is None else score(model, texts, batch_size=8).nll
    lines = []
    for seed in range(args.seeds):
        for method, adapter in METHODS.items():
            settings = {
                "seed": seed,
                "model.dtype": "float32",
                "data.max_length": args.max_length,
            }
            settings |= {"loss.reference": "cached", "optimizer.warmup_steps": args.steps // 10}
            settings |= {"train.eval_on_start": False, "data.cache": str(args.out / "tokens")}
            result = mj.finetune(
                args.model,
                train,
                adapter,
                loss="dpo",
                eval_rows=held_out,
                steps=args.steps,
                batch_size=BATCH_SIZE,
                learning_rate=rates[method],
                out=args.out / f"{method}-{seed}",
                config=settings,
                overwrite=True,
            )
            final = {"method": method, "seed": seed, "rate": rates[method]} | result.metrics[-1]
            if texts is not None and before is not None:
                final["forgotten"] = score(result.model, texts, batch_size=8).nll - before
            lines.append(final)
            print(json.dumps(final), flush=True)
    names = ("reward_accuracy", "margin", "loss")
    print("| method | seed | rate | " + " | ".join(names) + " | text loss, nats a token |")
    print("| --- | ---: | ---: | " + "---: | " * (len(names) + 1))
    for line in lines:
        cells = [f"{line[f'eval_{name}']:.3f} ± {line[f'eval_{name}_stderr']:.3f}" for name in names]
        forgotten = f"{line['forgotten']:+.4f}" if "forgotten" in line else "-"
        print(f"| {line['method']} | {line['seed']} | {line['rate']:g} | {' | '.join(cells)} | {forgotten} |")


def plain_texts(path: str, tokenizer, max_length: int) -> EncodedDataset:
    """The first paragraphs of a file."""
    rows = [row for row in load_rows(path, format="text") if len(str(row)) > 200][:32]
    return EncodedDataset.build(rows, tokenizer, mode="full", max_length=max_length)


if __name__ == "__main__":
    main()
