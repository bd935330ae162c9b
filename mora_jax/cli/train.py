"""Fine-tune a model: LoRA, MoRA or full, with masked, unmasked or weighted instruction loss.

A config file is a Python file with get_config() returning an ml_collections.ConfigDict; it sets only what it
changes. Every key below can be set by --config.KEY=VALUE, whether or not the file names it.
"""

import argparse
import sys
import textwrap

from mora_jax.cli.options import OVERRIDE
from mora_jax.errors import InputError
from mora_jax.training.config import keys

HELP = "fine-tune a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.usage = (
        "mora-jax train [--config FILE] [--config.KEY=VALUE ...] [--overwrite]\n       mora-jax train --resume RUN"
    )
    parser.add_argument("--config", metavar="FILE", help="config file, such as configs/smollm2_dolly.py")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this directory from its last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is already in config.out")
    lines = ["configuration keys:"]
    for name, key in keys().items():
        default = "required" if name in ("out", "model.path", "data.train") else f"default: {key.default}"
        lines.append(f"  {name}")
        words = f"{key.allowed.doc} ({key.describe()}; {default})"
        lines += textwrap.wrap(words, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    parser.epilog = "\n".join(lines).replace("%", "%%")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if args.resume is not None:
        others = (
            (args.config, "--config"),
            (args.overwrite, "--overwrite"),
            (args.overrides, OVERRIDE + "KEY"),
        )
        for given, flag in others:
            if given:
                raise InputError(f"{flag} can't be given with --resume, which goes on as the run's config.json says")
    else:
        from mora_jax.training.config_file import load_config

        config, note = load_config(args.config, args.overrides)
        if note:
            print(f"warning: {note}", file=sys.stderr)
    from mora_jax.training import loop
    from mora_jax.training.display import make_display

    with make_display() as display:
        if args.resume is not None:
            display.loading(f"loading the run in {args.resume}")
            return loop.resume(args.resume, display)
        display.loading(f"loading {config.model.path}")
        return loop.train(config, display, overwrite=args.overwrite)
