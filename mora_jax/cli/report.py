"""Show runs beside each other: what came of them, which settings differ, their curves, what they answer."""

import argparse
import json
import sys

from mora_jax.cli.options import add_number
from mora_jax.display.pages import page_file, write_page

HELP = "compare runs, as a table or a web page"


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
    from mora_jax.display.tables import fitted, show, terminal_width
    from mora_jax.report.answers import BASE, answer, ask
    from mora_jax.report.page import difference_table, report_page, result_table
    from mora_jax.report.runs import differences, read_runs

    html = None if args.html is None else page_file(args.html)
    runs = read_runs(args.runs, lambda text: print(f"note: {text}", file=sys.stderr), BASE)
    questions = ask(args.prompt, args.prompts, args.samples)
    silent = {}
    if questions:
        silent = answer(questions, runs, args.max_new_tokens, lambda name: print(f"{name} answers", file=sys.stderr))
        for name, why in silent.items():
            print(f"note: {name} does not answer: {why}", file=sys.stderr)
    if html is not None:
        write_page(html, report_page(runs, questions, silent, args.max_new_tokens))
        print(f"wrote {args.html}", file=sys.stderr)
    if args.json:
        values = {
            "runs": [{"run": one.name, "path": one.path, "state": one.state, **one.results()} for one in runs],
            "differences": differences(runs),
            "answers": [
                {"prompt": asked.messages[-1].text, "reference": asked.reference, "answers": asked.answers}
                for asked in questions
            ],
        }
        print(json.dumps(values))
        return 0
    width = terminal_width()
    results = result_table(runs)
    for table in fitted(results.heads, results.rows, width):
        show(table, width)
    for note in results.notes:
        print(note)
    if differences(runs):
        print()
        for table in fitted(*difference_table(runs), width):
            show(table, width)
    for asked in questions:
        print(f"\n> {asked.messages[-1].text}")
        reference = {} if asked.reference is None else {"in the data": asked.reference}
        for name, text in (reference | asked.answers).items():
            print(f"[{name}]\n{text}\n")
    return 0
