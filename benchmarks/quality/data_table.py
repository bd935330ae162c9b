"""Which share of a data file's tokens carries loss in each mode, and how long instructions are beside answers.

    python benchmarks/quality/data_table.py --data a.json b.jsonl --model SmolLM2-135M-Instruct stories260K

prints two markdown tables to stdout. Rows are not cut, unless `--max-length` says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mora_jax.data import EncodedDataset, LossWeights, Source, load_tokenizer
from mora_jax.data.loss_weights import MODES
from mora_jax.errors import InputError

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--data {data} --model {model}"
QUICK = ""

# One weight for the modes that take one; it changes no share, since a token of any weight counts.
PROMPT_WEIGHT = 0.1


def measure(path: Path, model: Path, max_length: int, truncation: str) -> tuple[list[str], list[str]]:
    """The cells of one file and one tokenizer, in the table of files and in that of modes."""
    tokenizer = load_tokenizer(str(model))
    store = Source((str(path),), cache="off", workers=1).load(tokenizer)
    reports = {
        mode: EncodedDataset(store, LossWeights(mode, PROMPT_WEIGHT), max_length, truncation).report for mode in MODES
    }
    masked = reports["masked"]
    ratio, median = ("none" if value is None else f"{value:.2f}" for value in (masked.ratio, masked.median_ratio))
    facts = [masked.format, f"{masked.rows:,}", f"{masked.kept:,}", ratio, median, str(masked.recommended_max_length)]
    shares = [f"{report.trained_fraction:.1%}" for report in reports.values()]
    name = [path.name, model.name]
    return name + facts, name + shares


def table(names: list[str], words: int, rows: list[list[str]]) -> str:
    """A markdown table whose first columns are words and whose others are numbers."""
    rule = ["---"] * words + ["---:"] * (len(names) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (names, rule, *rows))


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", nargs="+", type=Path, required=True, metavar="DIR", help="tokenizer folders")
    parser.add_argument("--max-length", type=int, default=1 << 20, metavar="N")
    parser.add_argument("--truncation", default="right")
    args = parser.parse_args()
    pairs = [(path, model) for path in args.data for model in args.model]
    measured = [measure(path, model, args.max_length, args.truncation) for path, model in pairs]
    facts, shares = zip(*measured, strict=True)
    print(table(["file", "tokenizer", "format", "rows", "kept", "ratio", "median", "99 % fit"], 3, list(facts)))
    print()
    print(table(["file", "tokenizer", *MODES], 2, list(shares)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
