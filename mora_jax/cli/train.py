"""Fine-tune a model: LoRA, MoRA or full, with masked, unmasked or weighted instruction loss.

A config file is a Python file with get_config() returning an ml_collections.ConfigDict, or YAML or JSON with the same
sections, such as a run's config.json; it sets only what it changes. Every configuration key can be set by
--config.KEY=VALUE, whether or not the file names it.
"""

import argparse
import re
import shlex
import shutil
import textwrap
from typing import Any

from mora_jax.cli.distributed import add_processes, together
from mora_jax.errors import InputError

HELP = "fine-tune a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.usage = (
        "mora-jax train [--config FILE] [--config.KEY=VALUE ...] [--profile [FIRST:LAST]] [--overwrite]\n"
        "       mora-jax train --resume RUN [--config.KEY=VALUE ...] [--profile [FIRST:LAST]]\n"
        "       mora-jax train ... --coordinator HOST:PORT --process-id I --process-count N"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="config file (.py, .yaml or .json), such as configs/smollm2_dolly.py"
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue the run in this directory from its last checkpoint, without further options; those that don't "
        "change the run's result, such as --config.mesh.*, may be given",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is already in config.out")
    parser.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="FIRST:LAST",
        help="write an XProf trace of these steps, both included and counted as in metrics.jsonl, into the run "
        "directory; without a range, of three steps after warming up",
    )
    add_processes(parser)
    from mora_jax.training.config.schema import keys

    lines, width = ["configuration keys:"], max(40, min(100, shutil.get_terminal_size().columns - 2))
    for name, key in keys().items():
        default = "required" if name in ("out", "model.path", "data.train") else f"default: {key.show(key.default)}"
        lines.append(f"  {name}")
        description = f"{key.doc} ({key.describe()}; {default})"
        lines += textwrap.wrap(description, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    parser.epilog = "\n".join(lines).replace("%", "%%")


def profile_keys(text: str | None) -> dict[str, int]:
    """The configuration keys that `--profile` stands for: none without it.

    Raises:
        InputError: it is no range of steps.
    """
    if text is None:
        return {}
    if not text:
        return {"log.profile_steps": 3}
    steps = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    first, last = (int(steps[1]), int(steps[2])) if steps else (0, 0)
    if not 1 <= first <= last:
        raise InputError(f"--profile must be FIRST:LAST, two steps from 1 on in order, such as 10:12; got {text!r}")
    return {"log.profile_first": first, "log.profile_steps": last - first + 1}


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    profile = profile_keys(args.profile)
    if args.resume is not None:
        given = [f"--{name}" for name in ("config", "overwrite") if getattr(args, name)]
        if given:
            raise InputError(f"{given[0]} can't be given with --resume, which continues as the run's config.json says")
        return together(args, f"mora-jax train --resume {args.resume}", lambda display: _resume(args, profile, display))
    from mora_jax.training.config.load import load_config

    overrides = [*args.overrides, *((name, str(value)) for name, value in profile.items())]
    config, note = load_config(args.config, overrides)
    return together(
        args, f"mora-jax train --resume {config.out}", lambda display: _train(config, note, display, args.overwrite)
    )


def _train(config: Any, note: str | None, display: Any, overwrite: bool) -> int:
    from mora_jax.training import loop

    if note:
        display.note(f"warning: {note}")
    display.loading(f"loading {config.model.path}")
    return _with_next_command(loop.train(config, display, overwrite=overwrite), config, display)


def _resume(args: argparse.Namespace, profile: dict[str, int], display: Any) -> int:
    from mora_jax.training import loop
    from mora_jax.training.run.directory import RunDirectory

    display.loading(f"loading the run in {args.resume}")
    code = loop.resume(args.resume, display, changes=args.overrides, profile=profile)
    return _with_next_command(code, RunDirectory(args.resume).read_config(), display)


def _with_next_command(code: int, config: Any, display: Any) -> int:
    """Says, after a run that came to its end, how to try what it left; returns the run's exit code."""
    if code == 0:
        from mora_jax.training.run.saving import result_name

        name = result_name(config)
        result = ["--model", f"{config.out}/{name}"] if name == "model" else ["--adapter", config.out]
        display.note(f"try it: {shlex.join(['mora-jax', 'generate', *result, '--prompt'])} '...'")
    return code
