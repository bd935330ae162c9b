"""Say what a model, an adapter or a run is: family, sizes, parameters by part, what targets would match, and how many
numbers each method would train. Nothing but the headers of files is read."""

import argparse
import json
from typing import Any

from mora_jax.cli.options import adapter_folder, add_number

HELP = "family, sizes and parameters of a model, an adapter or a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("path", metavar="MODEL", help="HuggingFace folder, hub id, adapter folder or run directory")
    add_number(parser, "--rank", int, 8, "Rank for the counts of methods.", at_least=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mora_jax.interop.describe import describe, describe_adapter
    from mora_jax.paths import expanded
    from mora_jax.report.runs import read_runs

    if (expanded(args.path) / "metrics.jsonl").is_file():
        (trained,) = read_runs([args.path], lambda text: None, "base")
        description: dict[str, Any] = {"kind": "run", "path": trained.path, "state": trained.state, **trained.results()}
        description |= {"model": trained.config.model.path, "method": trained.config.adapter.method}
        if (expanded(args.path) / "adapter").is_dir():
            description["adapter"] = describe_adapter(adapter_folder(args.path))
    else:
        description = describe(args.path, args.rank)
    print(json.dumps(description) if args.json else "\n".join(_lines(description)))
    return 0


def _lines(description: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in description.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name + ':':{max(12, 24 - len(indent))}} {_words(value)}")
    return lines


def _words(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
