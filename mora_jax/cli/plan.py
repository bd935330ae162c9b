"""Say before you rent anything whether a run fits, and what a step will cost: memory on each chip, FLOPs, collectives,
time, and the mesh, micro-batch and remat that fit best.

The real training step of the real shapes is compiled for the TPU asked for, on any machine, where libtpu is installed
(pip install 'mora-jax[plan]'); for GPUs, and without libtpu, memory is by a formula. No weights are read. Every key of
`mora-jax train` can be set by --config.KEY=VALUE; data and output are not looked at.
"""

import argparse
import json
import sys

from mora_jax.cli.options import add_number

HELP = "say whether a run fits, and what it costs"
_UNNAMED = "an unnamed model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--accelerator", required=True, metavar="A", help="v5e-8, v5p-64, v6e-16, h100x8, ...")
    parser.add_argument("--config", metavar="FILE", help="config file, as for train")
    parser.add_argument(
        "--model",
        metavar="M",
        help="shapes: a folder with config.json, or llama3-8b, qwen3-14b, ...; wins over the config",
    )
    help_text = "Candidates to compile besides the config's own; 0: everything by formula."
    add_number(parser, "--tries", int, 3, help_text, at_least=0)
    add_number(parser, "--price", float, None, "Price of one chip for one hour, for the run's cost.", at_least=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    import jax

    from mora_jax.display.tables import show
    from mora_jax.errors import InputError
    from mora_jax.planning.advice import advise
    from mora_jax.planning.model_shapes import read_model
    from mora_jax.planning.plan import check_plannable
    from mora_jax.planning.report import as_json, view
    from mora_jax.planning.topology import read_topology
    from mora_jax.training.config.load import load_config

    # Shapes are all that is worked with here: leave the machine's accelerators, if it has any, to others.
    jax.config.update("jax_platforms", "cpu")
    topology = read_topology(args.accelerator)
    unread = {"data.train": ("unread",), "out": "unread", "model.path": args.model or _UNNAMED}
    config, note = load_config(args.config, args.overrides, unread)
    if note:
        print(f"warning: {note}", file=sys.stderr)
    model = args.model or config.model.path
    if model is None or model == _UNNAMED:
        raise InputError("no model: give --model, such as --model llama3-8b, or --config.model.path")
    values = read_model(model)
    check_plannable(config)
    advice = advise(config, values, topology, args.tries, lambda line: print(line, file=sys.stderr))
    if args.json:
        print(json.dumps(as_json(advice, model, args.price)))
        return 0
    show(view(advice, model, args.price))
    return 0
