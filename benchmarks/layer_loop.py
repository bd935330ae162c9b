"""A training step with a loop over the layers against one without, by method and dtype.

    python benchmarks/layer_loop.py --model SmolLM2-135M-Instruct [--methods lora full] [--dtypes float32 bfloat16]
        [--rows 2] [--length 256] [--rounds 5]

The two forms of one method and dtype take turns in one process, a step each a round. The table gives the first step,
which compiles, medians of the others by the clock and of CPU time, of that the system's, page faults, and the temporary
memory as compiled.
"""

import argparse
import statistics
from pathlib import Path

from measuring import Times, save, table, take_turns
from training_step import TrainingStep

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --json {json}"
QUICK = "--rows 1 --length 32 --rounds 1 --methods lora --dtypes float32"


def row(name: str, one: TrainingStep, taken: Times) -> list[str]:
    """The cells of one form."""
    cpu, system, faults = (statistics.median(found) for found in (one.spent.cpu, one.spent.system, one.spent.faults))
    return [
        name,
        f"{taken.first:.1f}",
        f"{taken.median:.2f}",
        taken.spread,
        f"{cpu:.2f}",
        f"{system:.2f}",
        f"{faults:,.0f}",
        f"{one.temporary / 1e6:,.0f}",
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the times of each round here")
    args = parser.parse_args()
    rows, found = [], {}
    for method in args.methods:
        for dtype in args.dtypes:
            forms = {
                f"{method} {dtype}, {form}": TrainingStep(args.model, dtype, method, args.rows, args.length, unroll)
                for form, unroll in {"loop": 1, "unrolled": 10_000}.items()
            }
            times = take_turns(forms, args.rounds)
            rows += [row(name, one, times[name]) for name, one in forms.items()]
            found |= {name: {"times": times[name], "spent": one.spent} for name, one in forms.items()}
    columns = ["step", "first step", "median s", "least to most", "CPU s", "system s", "page faults", "temporary, MB"]
    print(table(columns, 1, rows))
    print(f"\n{args.rows} × {args.length} tokens a step")
    save(args.json, found)


if __name__ == "__main__":
    main()
