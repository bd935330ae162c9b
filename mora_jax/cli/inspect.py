"""Show what a data file becomes: which tokens carry loss, how long rows are, what is dropped and why."""

import argparse
import json

from mora_jax.cli.options import add_data, add_number

HELP = "show which tokens of a data file carry loss"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--model", required=True, metavar="M", help="HuggingFace folder or hub id with the tokenizer")
    add_data(parser)
    add_number(parser, "--examples", int, 1, "Encoded examples to show.", at_least=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mora_jax.data import EncodedDataset, describe_example, inspect_data, load_rows, load_tokenizer
    from mora_jax.interop.hub import local_folder
    from mora_jax.training.example_text import print_examples

    settings = {
        "template": args.template,
        "mode": args.loss_mode,
        "prompt_weight": args.prompt_weight,
        "max_length": args.max_length,
        "truncation": args.truncation,
    }
    if args.json:
        tokenizer = load_tokenizer(local_folder(args.model))
        found = inspect_data(args.data, tokenizer, format=args.format, examples=args.examples, **settings)
        print(json.dumps(found))
        return 0
    rows = load_rows(args.data, args.format)
    tokenizer = load_tokenizer(local_folder(args.model))
    dataset = EncodedDataset.build(rows, tokenizer, **settings)
    print(dataset.report)
    print_examples(describe_example(example, tokenizer) for example in dataset.examples[: args.examples])
    return 0
