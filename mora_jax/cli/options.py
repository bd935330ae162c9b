"""Options that several commands share, and the `--config.section.key=value` overrides of `train`."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mora_jax.errors import InputError
from mora_jax.training.config.key import Key

if TYPE_CHECKING:
    from mora_jax.data.dataset import EncodedDataset

#: What options are added to.
Parser = argparse.ArgumentParser | argparse._ArgumentGroup
OVERRIDE = "--config."
ADAPTER = "adapter folder, a run directory that holds one, or a checkpoint of a run, RUN@STEP"


class KeyAction(argparse.Action):
    """Stores an option's text as a value of a configuration key, with that key's checks and errors."""

    def __init__(self, *args: Any, key: Key, **kwargs: Any) -> None:
        """Takes the key beside argparse's own arguments."""
        super().__init__(*args, **kwargs)
        self.key = key

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Checks and stores the value."""
        setattr(namespace, self.dest, self.key.parse(values, option_string or self.dest))


def add_key(parser: Parser, flag: str, name: str, *, help: str = "", **changes: Any) -> None:
    """Adds an option that stands for a configuration key: same type, range, default and words.

    Args:
        parser: where to add it.
        flag: the option, such as "--loss-mode".
        name: the dotted key, such as "loss.mode".
        help: a sentence in place of the key's own.
        **changes: argparse arguments, such as `default` or `required`.
    """
    from mora_jax.training.config.schema import keys

    add_value(parser, flag, keys()[name], help=help, **changes)


def add_number(parser: Parser, flag: str, type_: type, default: Any, doc: str, **limits: Any) -> None:
    """Adds a number option with a range (see `Key`)."""
    options = (type_, type(None)) if default is None else (type_,)
    add_value(parser, flag, Key(name=flag, types=options, default=default, doc=doc, **limits))


def add_value(parser: Parser, flag: str, key: Key, *, help: str = "", **changes: Any) -> None:
    """Adds an option whose value a `Key` checks."""
    default = changes.pop("default", key.default)
    words = f"{(help or key.doc).rstrip('.')} ({key.describe()}; default: {key.show(default)})"
    metavar = flag.rpartition("-")[2].upper()
    changes.setdefault("metavar", metavar)
    # A '%' in help would be argparse's formatting.
    parser.add_argument(flag, action=KeyAction, key=key, default=default, help=words.replace("%", "%%"), **changes)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, `--adapter`, `--dtype` and `--quantize`."""
    parser.add_argument("--model", required=True, metavar="M", help="HuggingFace folder or hub id of the base model")
    parser.add_argument("--adapter", metavar="A", help=ADAPTER)
    add_adapter(parser)
    add_key(parser, "--dtype", "model.dtype")
    add_key(parser, "--quantize", "model.quantize")


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Adds what says how an adapter is read: `--strict` and `--adapter-kind`."""
    from mora_jax.training.config.schema import keys

    parser.add_argument("--strict", action="store_true", help="refuse an adapter that names another base model")
    key = dataclasses.replace(keys()["adapter.kind"], default=None, types=(str, type(None)))
    words = "Kind of a MoRA adapter whose file has an older one, as the MoRA authors' ReMoRA leaves it"
    add_value(parser, "--adapter-kind", key, help=words)


def add_out(parser: Parser, *, required: bool = False) -> None:
    """Adds `--out` and `--overwrite`, for a folder that is written."""
    words = "folder to write; must not exist yet, or be empty"
    parser.add_argument("--out", required=required, metavar="DIR", help=words)
    words = "replace what an earlier command wrote to --out; other files stay there"
    parser.add_argument("--overwrite", action="store_true", help=words)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which examples are read and which of their tokens carry loss."""
    from mora_jax.training.config.schema import keys

    data = dataclasses.replace(keys()["data.train"], name="--data", default=None)
    parser.add_argument("--data", action=KeyAction, key=data, required=True, metavar="FILE", help="data file or files")
    for name in ("format", "columns", "roles", "on_error", "split", "subset", "max_rows", "template", "fallback"):
        add_key(parser, "--" + name.replace("_", "-"), f"data.{name}")
    parser.add_argument("--streaming", action="store_true", help="read a hub data set without downloading it first")
    add_key(parser, "--max-length", "data.max_length")
    add_key(parser, "--truncation", "data.truncation")
    add_key(parser, "--cache", "data.cache")
    add_key(parser, "--loss-mode", "loss.mode")
    add_key(parser, "--prompt-weight", "loss.prompt_weight")
    add_key(parser, "--loss-roles", "loss.roles")
    add_key(parser, "--end-of-turn", "loss.end_of_turn")
    add_key(parser, "--headers", "loss.headers")


def read_data(args: argparse.Namespace, tokenizer: Any, vocab_size: int | None = None) -> "EncodedDataset":
    """The data set that the options of `add_data` describe.

    Raises:
        InputError: for data or options that can't be used.
    """
    from mora_jax.data.dataset import EncodedDataset
    from mora_jax.training.config.schema import DataConfig, LossConfig

    shared = {field.name for field in dataclasses.fields(DataConfig)} & vars(args).keys()
    section = dataclasses.replace(DataConfig(), **{name: getattr(args, name) for name in shared})
    loss = LossConfig(args.loss_mode, args.prompt_weight, args.loss_roles, args.end_of_turn, args.headers)
    return EncodedDataset(
        section.source(args.data, args.split).load(tokenizer),
        loss.weights,
        section.max_length,
        section.truncation,
        vocab_size=vocab_size,
        special_ids=tokenizer.all_special_ids,
    )


def take_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separates `--config.key=value` and `--config.key value` from the other arguments.

    A key without a value is a switch that is turned on.

    Returns:
        The other arguments, and the (key, text) pairs in order.
    """
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if not argument.startswith(OVERRIDE):
            rest.append(argument)
            continue
        name, equals, text = argument.removeprefix(OVERRIDE).partition("=")
        if not name:
            raise InputError(f"{argument}: a key must follow '{OVERRIDE}', as in {OVERRIDE}train.steps=50")
        if not equals:
            following = argv[position] if position < len(argv) else None
            if following is not None and not following.startswith("--"):
                text, position = following, position + 1
            else:
                text = "true"
        overrides.append((name, text))
    return rest, overrides
