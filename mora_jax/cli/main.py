"""Entry point of `mora-jax`: parsing, exit codes and what a stranger sees of an error.

Exit codes: 0 success; 2 bad input, with one line that starts `error:`; 130 after SIGINT and 143 after
SIGTERM; 1, with a traceback, only for a bug. Nothing here imports jax: commands do that when they are asked for.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import signal
import sys
import threading
import warnings
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from mora_jax import environment
from mora_jax.cli.errors import report, stopped
from mora_jax.cli.options import OVERRIDE, take_overrides
from mora_jax.cli.suggestions import check_options, flag_of, refuse_command, refuse_words, with_options
from mora_jax.environment import check_versions, prepare
from mora_jax.errors import InputError
from mora_jax.training.distributed.signals import ASKING, Stoppable, Stopped

_NAMES = (
    *("train", "eval", "generate", "chat", "merge", "convert", "check", "info", "inspect", "plan"),
    *("sweep", "study", "report", "lm-eval", "demo", "doctor"),
)
#: Commands in the order in which they are listed; each is the file of its name.
COMMANDS = {name: importlib.import_module(f"mora_jax.cli.{name.replace('-', '_')}") for name in _NAMES}
# Those that take --config.KEY=VALUE.
TAKE_KEYS = ("train", "plan", "sweep")
# Those that compile for seconds; runs say for themselves where what they compile is kept.
KEEP_PROGRAMS = ("eval", "generate", "chat", "lm-eval")
# Those that hand words they don't know to another program.
HAND_ON = ("lm-eval",)
EPILOG = """\
`mora-jax COMMAND --help` shows a command's options. For a first look: `mora-jax demo`, then

  mora-jax train --config.model.path=MODEL --config.data.train=rows.jsonl --config.out=runs/1
  mora-jax generate --model MODEL --adapter runs/1 --prompt "..."

MODEL is a HuggingFace folder or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are input errors like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises the parser's complaint."""
        raise InputError(f"{message} (see {self.prog} --help)")


class ShowVersion(argparse.Action):
    """Prints the installed versions and exits."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        """Does so when the option is met."""
        version, *others = (f"{name} {importlib.metadata.version(name)}" for name in ("mora-jax", "jax", "flax"))
        print(f"{version} ({', '.join(others)}, Python {platform.python_version()})")
        raise SystemExit(0)


def build_parser(described: Collection[str] = tuple(COMMANDS)) -> tuple[Parser, dict[str, Parser]]:
    """Returns the parser of all commands, and each command's own.

    Args:
        described: the commands whose options are there; what they describe is imported.
    """
    parser = Parser(
        prog="mora-jax",
        description="Fine-tune language models with LoRA and MoRA in JAX.",
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser, title="commands")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in described:
            module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser, commands.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if argv is None and not set(sys.argv[1:2]) & set(HAND_ON):
        environment.torch_allowed = False
    format_warning, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        with Stoppable(lambda message: print(message, file=sys.stderr, flush=True)) as signals:
            try:
                code = _run(sys.argv[1:] if argv is None else argv)
                print(end="", flush=True)
            except (Exception, KeyboardInterrupt, Stopped) as error:
                if signals.received is not None:
                    return stopped(signals.received)
                known = report(error)
                if known is None:
                    raise
                return known
            return code if code or signals.received is None else 128 + signals.received
    finally:
        warnings.formatwarning = format_warning
        if argv is None and threading.current_thread() is threading.main_thread():
            # All is done but the interpreter's shutdown, which a Ctrl-C would end with a traceback.
            for number in ASKING:
                signal.signal(number, signal.SIG_DFL)


def _run(argv: Sequence[str]) -> int:
    rest, overrides = take_overrides(argv)
    if rest[:1] == ["help"]:
        rest = [*rest[1:2], "--help"]
    name = rest[0] if rest else ""
    if name in COMMANDS:
        _before_jax(name, helps=not {"-h", "--help"}.isdisjoint(rest))
    parser, commands = build_parser([name])
    if not rest:
        parser.print_help(sys.stderr)
        print(file=sys.stderr)
        raise InputError(f"no command given; choose one of {', '.join(COMMANDS)}")
    try:
        if name in COMMANDS:
            takes_keys = name in TAKE_KEYS
            if name not in HAND_ON:
                check_options(name, commands[name], rest[1:], takes_keys)
            if overrides and not takes_keys:
                _refuse_key(name, commands[name], overrides[0][0])
        elif name not in ("-h", "--help", "--version"):
            refuse_command(name, list(COMMANDS))
        args, words = parser.parse_known_args(rest)
        if name in HAND_ON:
            args.words = words
        else:
            refuse_words(name, words, name in TAKE_KEYS)
        args.overrides = overrides
        if name not in KEEP_PROGRAMS:
            return args.run(args)
        from mora_jax.training.run.compilation_cache import persistent_compilation_cache

        with persistent_compilation_cache(None):
            return args.run(args)
    except InputError as error:
        if name not in COMMANDS or name in TAKE_KEYS:
            raise
        raise InputError(with_options(str(error), commands[name])) from None
    except SystemExit as stop:  # --help and --version
        if isinstance(stop, Stopped):
            raise
        return stop.code if isinstance(stop.code, int) else 0


def _before_jax(name: str, helps: bool) -> None:
    """What has to be found good before a command's options are described, since that imports jax."""
    if name == "doctor":  # which says so itself
        return
    try:
        check_versions()
    except ImportError as error:
        raise InputError(str(error)) from None
    if name != "plan" and not helps:  # plan takes the CPU whatever is named
        prepare()


def _refuse_key(command: str, parser: Parser, key: str) -> NoReturn:
    flag = flag_of(key, parser._option_string_actions)
    hint = f"; did you mean {flag}?" if flag else ""
    raise InputError(
        f"{OVERRIDE}{key}: only {', '.join(TAKE_KEYS[:-1])} and {TAKE_KEYS[-1]} take configuration keys{hint}"
    )


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    # The place in the code means nothing to whoever runs a command.
    return f"warning: {' '.join(str(message).split())}\n"
