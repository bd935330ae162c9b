"""Show runs beside each other: what came of them, which settings differ, their curves, what they answer."""

import argparse
import json
import sys

from mora_jax.cli.options import add_number
from mora_jax.cli.page_file import page_file

HELP = "compare runs, as a table or a web page"
# Columns where there is no terminal to ask: whatever the tables need.
_WIDTH = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; a sweep's folder is all of its runs")
    parser.add_argument("--html", metavar="FILE", help="also write a web page with curves, settings and answers")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="let every run answer this; may be repeated"
    )
    parser.add_argument("--prompts", metavar="FILE", help="let every run answer the first rows of a data file")
    add_number(parser, "--samples", int, 3, "Rows of --prompts.", at_least=1)
    add_number(parser, "--max-new-tokens", int, 64, "Most tokens of an answer.", at_least=1)


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mora_jax.report.answers import answer, ask
    from mora_jax.report.runs import differences, read_runs
    from mora_jax.report.table import difference_table, result_table

    html = None if args.html is None else page_file(args.html)
    runs = read_runs(args.runs)
    questions = ask(args.prompt, args.prompts, args.samples)
    silent = {}
    if questions:
        silent = answer(questions, runs, args.max_new_tokens, lambda name: print(f"{name} answers", file=sys.stderr))
        for name, why in silent.items():
            print(f"note: {name} does not answer: {why}", file=sys.stderr)
    if html is not None:
        from mora_jax.data.inspect.page import write_page
        from mora_jax.report.page import report_page

        write_page(html, report_page(runs, questions, silent, args.max_new_tokens))
        print(f"wrote {args.html}", file=sys.stderr)
    if args.json:
        found = {
            "runs": [{"run": one.name, "path": one.path, "state": one.state, **one.results()} for one in runs],
            "differences": differences(runs),
            "answers": [
                {"prompt": asked.messages[-1].text, "reference": asked.reference, "answers": asked.answers}
                for asked in questions
            ],
        }
        print(json.dumps(found))
        return 0
    _print(result_table(runs))
    if differences(runs):
        print()
        _print(difference_table(runs))
    for asked in questions:
        print(f"\n> {asked.messages[-1].text}")
        reference = {} if asked.reference is None else {"in the data": asked.reference}
        for name, text in (reference | asked.answers).items():
            print(f"[{name}]\n{text}\n")
    return 0


def _print(table: tuple[list[str], list[list[str]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heads, rows = table
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, head in enumerate(heads):
        shown.add_column(head, justify="right" if place else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    with console.capture() as captured:
        console.print(shown)
    print(*(line.rstrip() for line in captured.get().splitlines()), sep="\n")
