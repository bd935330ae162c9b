"""Rows a second and peak memory of the data pipeline: a file repeated to many rows, tokenised, packed, batched.

    python benchmarks/data_pipeline.py --data dolly.json --model DIR --rows 1000000

Each repetition changes the question, so no two rows are equal. Peak memory is that of this process and of the largest
worker, as the system counts resident pages; those of mapped token files are in it, although the system can drop them.
"""

import argparse
import contextlib
import json
import resource
import tempfile
import time
from pathlib import Path

from mora_jax.data import BatchPlan, EncodedDataset, load_tokenizer
from mora_jax.data.pipeline import BatchIterator, BatchSource
from mora_jax.data.sources import Source

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--data {data} --model {model}"
QUICK = "--rows 2000 --workers 1 --batches 20"


def repeat(source: Path, target: Path, rows: int) -> None:
    """Writes the rows of a JSON list, or of lines of JSON, over and over."""
    text = source.read_text(encoding="utf-8")
    known = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    with target.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = known[number % len(known)]
            if "messages" in row:
                first, *others = row["messages"]
                row = {"messages": [{**first, "content": f"{number}. {first['content']}"}, *others]}
            else:
                row = {**row, "instruction": f"{number}. {row['instruction']}"}
            file.write(json.dumps(row) + "\n")


def peaks() -> str:
    """Peak resident memory so far."""
    own, children = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return f"{own:,.0f} MB, largest worker {children:,.0f} MB"


def main() -> None:
    """Runs the measurement and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="a JSON list, or lines of JSON, of Alpaca rows or messages"
    )
    parser.add_argument("--model", required=True, help="a folder with a tokenizer")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--batches", type=int, default=500)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    print("| stage | seconds | rows a second | peak memory |\n|---|---|---|---|")

    def tell(stage: str, started: float, rows: int) -> None:
        seconds = time.perf_counter() - started
        print(f"| {stage} | {seconds:.1f} | {rows / seconds:,.0f} | {peaks()} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        repeat(args.data, path, args.rows)
        source = Source((str(path),), workers=args.workers, cache=folder)
        started = time.perf_counter()
        store = source.load(tokenizer)
        tell("read, render, tokenise, write", started, len(store))
        started = time.perf_counter()
        store = source.load(tokenizer)
        tell("find them again (hash the file)", started, len(store))
        started = time.perf_counter()
        dataset = EncodedDataset(store, max_length=1024, truncation="prompt_first")
        tell("weights, cuts, report", started, len(store))
        started = time.perf_counter()
        plan = BatchPlan(dataset.lengths, 16, epochs=1, max_length=1024, packing=True)
        tell("pack one epoch", started, len(dataset))
        batches = BatchSource(dataset, plan, 16)
        started = time.perf_counter()
        with contextlib.closing(BatchIterator(batches)) as iterator:
            examples = 0
            for _, batch in zip(range(args.batches), iterator, strict=False):
                examples += int(batch["segment_ids"].max(axis=-1).sum())
        tell(f"{args.batches} packed batches of 16 x 1024", started, examples)
        tokens = int(dataset.lengths.sum())
        print(f"\n{len(dataset):,} examples, {tokens:,} tokens, {plan.steps:,} steps, {plan.padding(1024):.2%} padding")


if __name__ == "__main__":
    main()
