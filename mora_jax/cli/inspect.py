"""Show what a data file becomes: which tokens carry loss, how long rows are, what is dropped and why, and which loss
mode the literature supports for such data."""

import argparse
import json
import sys

from mora_jax.cli.options import add_data, add_number
from mora_jax.display.pages import page_file

HELP = "show which tokens of a data file carry loss"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--model", required=True, metavar="M", help="HuggingFace folder or hub id with the tokenizer")
    add_data(parser)
    add_number(parser, "--examples", int, 1, "Encoded examples to show.", at_least=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", help="also write report and examples as a web page")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from rich.console import Console

    from mora_jax.cli.options import read_data
    from mora_jax.data import load_tokenizer
    from mora_jax.data.inspect.views import describe_example, first_examples, inspect_dataset, make_page, report_view
    from mora_jax.display.pages import write_page
    from mora_jax.display.tables import WIDTH, show
    from mora_jax.interop.hub import local_folder
    from mora_jax.training.display import print_examples

    html = None if args.html is None else page_file(args.html)
    tokenizer = load_tokenizer(local_folder(args.model))
    dataset = read_data(args, tokenizer, len(tokenizer))
    if html is not None:
        write_page(html, make_page(dataset, tokenizer, args.examples, recognised=args.format is None))
        print(f"wrote {args.html}", file=sys.stderr)
    if args.json:
        print(json.dumps(inspect_dataset(dataset, args.examples)))
        return 0
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    show(report_view(dataset, tokenizer, console, recognised=args.format is None))
    shown = (
        (example.source, describe_example(example, tokenizer)) for example in first_examples(dataset, args.examples)
    )
    print_examples(shown, console)
    return 0
