"""Score a model on a data file: perplexity and next-token accuracy over the tokens that carry loss."""

import argparse
import json
import math
import sys

from mora_jax.cli.options import add_data, add_key, add_model
from mora_jax.cli.progress import progress
from mora_jax.errors import InputError

HELP = "perplexity and accuracy on a data file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    add_data(parser)
    add_key(parser, "--batch-size", "train.batch_size", help="Rows computed at once", default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mora_jax.cli.load import load
    from mora_jax.cli.options import read_data
    from mora_jax.evaluation.perplexity import score

    reading = {"strict": args.strict, "kind": args.adapter_kind}
    model, tokenizer = load(args.model, args.adapter, args.dtype, unroll=1, quantize=args.quantize, **reading)
    dataset = read_data(args, tokenizer, model.config.vocab_size)
    for note in dataset.report.notes:
        print(f"note: {note}", file=sys.stderr)
    with progress("scoring") as report:
        scores = score(model, dataset, batch_size=args.batch_size, progress=report)
    if not math.isfinite(scores.nll):
        raise InputError(f"{args.model} gives a loss of {scores.nll} on {', '.join(args.data)}; try --dtype float32")
    result = {
        **scores.to_dict(),
        "examples": len(dataset),
        "dropped": dataset.report.dropped,
        "loss_mode": args.loss_mode,
        "template": dataset.report.template,
        "model": args.model,
        "adapter": args.adapter,
    }
    print(json.dumps(result) if args.json else str(scores))
    return 0
