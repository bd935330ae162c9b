"""Fine-tune with several settings at once, to choose a learning rate or a method.

Every combination of the values that --sweep names is a run of its own, with its own folder OUT/runs/NAME, where OUT is
config.out. Runs that differ in numbers alone (learning rate and schedule, weight decay, seed, loss mode) train together
over one base in memory. OUT/sweep.csv and OUT/sweep.png show what came of them. The same command, or --resume OUT,
continues a sweep that was stopped.
"""

import argparse
from typing import Any

from mora_jax.cli.options import add_number
from mora_jax.errors import InputError

HELP = "fine-tune with several settings at once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.usage = (
        "mora-jax sweep --sweep KEY=VALUE,VALUE [--sweep ...] [--config FILE] [--config.KEY=VALUE ...] [--overwrite]\n"
        "       mora-jax sweep --resume OUT"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        metavar="KEY=VALUE,VALUE",
        help="a configuration key and its values, such as optimizer.learning_rate=1e-4,3e-4,1e-3; may be given for "
        "several keys",
    )
    parser.add_argument("--config", metavar="FILE", help="config file, as of mora-jax train; its keys are all runs'")
    parser.add_argument("--resume", metavar="OUT", help="continue the sweep in this folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a sweep that is already in config.out")
    add_number(parser, "--at-once", int, None, "The most runs that train together; none: all that can.", at_least=1)
    parser.epilog = "mora-jax train --help lists the configuration keys."


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if args.resume is not None:
        given = [f"--{name}" for name in ("sweep", "config", "overwrite") if getattr(args, name)]
        given += [f"--config.{name}" for name, _ in args.overrides]
        if given:
            raise InputError(f"{given[0]} can't be given with --resume, which continues as OUT/sweep.json says")
        return _train(args, None, [])
    from mora_jax.sweeps.grid import combinations, expand, parse_grid
    from mora_jax.training.config.load import check_together, read_settings
    from mora_jax.training.config.schema import Config, lay_over, unused

    grid = parse_grid(args.sweep or [])
    settings = combinations(grid)
    both = next((name for name, _ in args.overrides if name in grid), None)
    if both:
        raise InputError(f"--sweep {both} and --config.{both} are both given; leave out one of them")
    common = read_settings(args.config, args.overrides)
    base = lay_over(Config(), common)

    def config_of(values: dict[str, Any]) -> Config:
        config = lay_over(base, [(name, value, f"--sweep {name}") for name, value in values.items()])
        check_together(config)
        return config

    runs = expand(settings, config_of, base.out)
    # What one of the runs reads is not ignored.
    ignored = {name for name, _, _ in common if all(unused(run.config, {name}) for run in runs)}
    return _train(args, base.out, runs, unused(runs[0].config, ignored))


def _train(args: argparse.Namespace, out: str | None, runs: Any, note: str | None = None) -> int:
    from mora_jax.sweeps.board import make_board
    from mora_jax.sweeps.folder import SweepFolder
    from mora_jax.sweeps.train import train_runs

    folder = SweepFolder(args.resume if out is None else out)
    board = make_board()
    if note:
        board.note(f"warning: {note}")
    result = train_runs(runs or folder.runs(), folder, board, at_once=args.at_once, overwrite=args.overwrite)
    print(result.table())
    if result.exit_code:
        board.note(f"stopped; continue with mora-jax sweep --resume {folder.path}")
        return result.exit_code
    if result.best is not None:
        outcome = f"the best of {len(result.runs)} runs is {result.best.name}"
    elif result.comparable:
        raise InputError(f"every run failed: {result.runs[0].failed or 'no step had a finite loss'}")
    else:
        outcome = "no run is called the best, since their losses are of different data or objectives"
    board.note(f"{outcome}; all of them: {folder.path / 'sweep.csv'}")
    return 0
