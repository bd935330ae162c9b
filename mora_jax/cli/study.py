"""Run one of the papers' questions as an experiment: a grid of methods, learning rates and seeds.

Learning rates are chosen on three seeds and reported on others. DIR then holds cells.csv (one measurement a line),
claims.json, conclusion.md, figures, and each cell's run directory. The same command goes on with a study that was
stopped.
"""

import argparse
import dataclasses
from typing import Any

from mora_jax.cli.options import add_number

HELP = "run one of the papers' experiments"
NAMES = ("memorize", "forget", "instruct", "rates")
PRESETS = ("tiny", "quick", "ranks", "saturation", "small", "paper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=f"{', '.join(NAMES)}")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="tiny: seconds, to see the form; quick: minutes on two cores, on the embedded model (default); ranks (of "
        "forget) and saturation (of memorize): an hour and hours there; small: a model of about 100 M parameters; "
        "paper: 7 B parameters on eight accelerators",
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--model", metavar="MODEL", help="base model: a folder or a hub id; the embedded one if not given"
    )
    parser.add_argument("--data", action="append", metavar="FILE", help="rows to learn, in place of the study's own")
    parser.add_argument("--texts", metavar="FILE", help="texts like those that the base was pretrained on")
    add_number(parser, "--seeds", int, None, "How many seeds are reported; none: as the preset says.", at_least=2)
    parser.add_argument(
        "--robust", action="store_true", help="run what is reported once more from weights with a little noise"
    )
    parser.add_argument("--cells", metavar="REGEX", help="train only cells whose name it is found in")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the study in DIR; failed cells are tried again"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in DIR")
    parser.add_argument("--list", action="store_true", help="print the names of the cells and train nothing")
    parser.add_argument(
        "--plan", metavar="A", help="print what the cells take on an accelerator (v5e-8, h100x8, ...) and train nothing"
    )
    add_number(parser, "--price", float, None, "With --plan: the price of one chip for one hour.", at_least=0)
    add_number(parser, "--at-once", int, None, "The most runs that train together; none: all that can.", at_least=1)


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mora_jax import demo
    from mora_jax.errors import InputError
    from mora_jax.studies.cells import cell_names
    from mora_jax.studies.run import STUDIES, run_study
    from mora_jax.studies.study import Sources

    study = STUDIES[args.name]
    if args.preset not in study.presets:
        raise InputError(f"study {args.name} has no preset {args.preset}; choose one of {', '.join(study.presets)}")
    preset = study.presets[args.preset]
    preset = dataclasses.replace(preset, seeds=args.seeds or preset.seeds)
    if args.list:
        print("\n".join(cell_names(preset)))
        return 0
    if args.plan is not None:
        return _plan(preset, args)
    if args.price is not None:
        raise InputError("--price is read with --plan alone")
    if args.out is None:
        raise InputError(f"--out is missing: the folder of the study, such as --out studies/{args.name}")
    if args.model is None and args.preset in ("small", "paper"):
        raise InputError(f"--preset {args.preset} is for a model of your own: give --model MODEL")
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite are both given; leave out one of them")
    sources = Sources(args.model or demo.model_path(), tuple(args.data) if args.data else None, args.texts)
    given = {name: getattr(args, name) for name in ("cells", "seeds", "robust", "resume", "overwrite", "at_once")}
    result = run_study(study, args.preset, args.out, sources, **given)
    print(result.conclusion)
    return result.exit_code


def _plan(preset: Any, args: argparse.Namespace) -> int:
    import jax

    from mora_jax import demo
    from mora_jax.planning.model_shapes import read_model
    from mora_jax.planning.topology import read_topology
    from mora_jax.studies.cells import price_table

    # Shapes are all that is worked with here.
    jax.config.update("jax_platforms", "cpu")
    topology = read_topology(args.plan)
    model = args.model or demo.model_path()
    print(price_table(preset, model, read_model(model), topology, args.price))
    return 0
