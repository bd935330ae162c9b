"""Which share of a data file's tokens carries loss in each mode, and how long instructions are beside answers.

    python benchmarks/data_table.py --data a.json b.jsonl --model SmolLM2-135M-Instruct stories260K

prints a markdown table to stdout. Rows are not cut, unless `--max-length` says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mora_jax.data import EncodedDataset, LossWeights, Source, load_tokenizer
from mora_jax.data.weights import MODES
from mora_jax.errors import InputError

# One weight for the modes that take one; it changes no share, since a token of any weight counts.
PROMPT_WEIGHT = 0.1


def table_row(path: Path, model: Path, max_length: int, truncation: str) -> list[str]:
    """The cells of one file and one tokenizer."""
    tokenizer = load_tokenizer(str(model))
    store = Source((str(path),), cache="off", workers=1).load(tokenizer)
    shares = []
    for mode in MODES:
        report = EncodedDataset(store, LossWeights(mode, PROMPT_WEIGHT), max_length, truncation).report
        shares.append(f"{report.trained_fraction:.1%}")
    masked = EncodedDataset(store, LossWeights(), max_length, truncation).report
    ratio, median = ("none" if value is None else f"{value:.2f}" for value in (masked.ratio, masked.median_ratio))
    facts = [masked.format, f"{masked.rows:,}", f"{masked.kept:,}", ratio, median]
    return [path.name, model.name, *facts, str(masked.recommended_max_length), *shares]


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", nargs="+", type=Path, required=True, metavar="DIR", help="tokenizer folders")
    parser.add_argument("--max-length", type=int, default=1 << 20, metavar="N")
    parser.add_argument("--truncation", default="right")
    args = parser.parse_args()
    names = ["file", "tokenizer", "format", "rows", "kept", "ratio", "median", "99 % fit", *MODES]
    print("| " + " | ".join(names) + " |")
    print("| --- | --- | --- |" + " ---: |" * (len(names) - 3))
    for path in args.data:
        for model in args.model:
            print("| " + " | ".join(table_row(path, model, args.max_length, args.truncation)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
