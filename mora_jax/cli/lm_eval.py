"""EleutherAI's lm-evaluation-harness on a model of this library: its own command line, with the model mora_jax added.

The harness finds no models of other packages by itself. So this command makes its model known and hands all options
that it doesn't have itself to the harness, whose --model is mora_jax unless they name another:

  mora-jax lm-eval --model_args pretrained=M,adapter=A,dtype=float32 --tasks arc_easy,gsm8k --batch_size 16

With --adapter the harness runs once for each adapter, with the base loaded once. Files that it writes get the adapter's
name at the end of theirs:

  mora-jax lm-eval --base --adapter lora=runs/1 --adapter mora=runs/2 --model_args pretrained=M --tasks arc_easy

`lm-eval run --help` lists the harness's options.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mora_jax.cli.distributed import add_processes, together
from mora_jax.cli.options import add_adapters, named_adapters
from mora_jax.errors import InputError

HELP = "the tasks of EleutherAI's lm-evaluation-harness"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_adapters(parser)
    parser.add_argument("--base", action="store_true", help="the base alone, before the adapters")
    add_processes(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""

    try:
        import lm_eval.__main__ as harness
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "lm_eval":
            raise
        raise InputError("lm-eval is not installed: pip install 'mora-jax[lm-eval]'") from None
    runs = command_lines(args.words, named_adapters(args.adapter), args.base)

    def work(_: object) -> int:
        from mora_jax.evaluation.lm_eval import one_base

        given = sys.argv
        try:
            with one_base():
                for words in runs:
                    sys.argv = ["lm-eval", *words]
                    harness.cli_evaluate()
        finally:
            sys.argv = given
        return 0

    return together(args, "the same command", work, silent=True)


def command_lines(words: Sequence[str], adapters: dict[str, str], base: bool) -> list[list[str]]:
    """What the harness is called with, once for each adapter.

    Args:
        words: what it was to be called with.
        adapters: folders by name.
        base: whether the base alone is wanted as well.

    Raises:
        InputError: `words` don't go with several adapters.
    """
    if words[:1] and words[0] in ("ls", "validate"):
        return [list(words)]
    parser = argparse.ArgumentParser(add_help=False)
    for name, short in {"use_cache": "-c", "output_path": "-o", "model": "-M", "config": "-C"}.items():
        parser.add_argument(short, f"--{name}")
    options = parser.parse_known_args(list(words))[0]
    model = [] if options.model or options.config else ["--model", "mora_jax"]
    if not adapters and not base:
        return [[*words, *model]]
    if options.config:
        raise InputError("--adapter and --base don't go with the harness's --config: give its options one by one")
    lines = []
    for name, folder in [*([("base", None)] if base else []), *adapters.items()]:
        line = [*words, *model]
        if folder is not None:
            line += ["--model_args", json.dumps({"adapter": folder})]
        for option in ("use_cache", "output_path"):
            if given := getattr(options, option):
                path = Path(given)
                line += [f"--{option}", str(path.with_name(f"{path.stem}_{name}{path.suffix}"))]
        lines.append(line)
    return lines
