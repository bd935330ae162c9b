"""Options that several commands share, loading what they name, and the `--config.section.key=value` overrides."""

import argparse
import atexit
import dataclasses
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mora_jax.errors import InputError
from mora_jax.paths import expanded, local_path
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


def add_keys(parser: Parser, section: str, *names: str) -> None:
    """Adds options of the same names as keys of a section: `--max-length` for `data.max_length`."""
    for name in names:
        add_key(parser, f"--{name.replace('_', '-')}", f"{section}.{name}")


def add_number(parser: Parser, flag: str, type_: type, default: Any, doc: str, **limits: Any) -> None:
    """Adds a number option with a range (see `Key`)."""
    options = (type_, type(None)) if default is None else (type_,)
    add_value(parser, flag, Key(name=flag, types=options, default=default, doc=doc, **limits))


def add_value(parser: Parser, flag: str, key: Key, *, help: str = "", **changes: Any) -> None:
    """Adds an option whose value a `Key` checks."""
    default = changes.pop("default", key.default)
    text = f"{(help or key.doc).rstrip('.')} ({key.describe()}; default: {key.show(default)})"
    changes.setdefault("metavar", flag.rpartition("-")[2].upper())
    # A '%' in help would be argparse's formatting.
    parser.add_argument(flag, action=KeyAction, key=key, default=default, help=text.replace("%", "%%"), **changes)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, `--dtype`, `--quantize` and what says how an adapter is read."""
    add_base(parser)
    add_keys(parser, "model", "dtype", "quantize")


def add_base(parser: argparse.ArgumentParser) -> None:
    """Adds `--model` and what says how an adapter is read."""
    description = "HuggingFace folder or hub id of the base model; if not given, the one that the adapter was made for"
    parser.add_argument("--model", metavar="M", help=description)
    add_adapter(parser)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Adds an `--adapter` that can be given several times, for `named_adapters`."""
    help_text = f"{ADAPTER}; several may be given"
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]A", help=help_text)


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Adds what says how an adapter is read: `--strict` and `--adapter-kind`."""
    from mora_jax.training.config.schema import keys

    parser.add_argument("--strict", action="store_true", help="refuse an adapter that names another base model")
    key = dataclasses.replace(keys()["adapter.kind"], default=None, types=(str, type(None)))
    description = "Kind of a MoRA adapter whose file has an older one, as the MoRA authors' ReMoRA leaves it"
    add_value(parser, "--adapter-kind", key, help=description)


def add_out(parser: Parser, *, required: bool = False) -> None:
    """Adds `--out` and `--overwrite`, for a folder that is written."""
    description = "folder to write; must not exist yet, or be empty"
    parser.add_argument("--out", required=required, metavar="DIR", help=description)
    description = "replace what an earlier command wrote to --out; other files stay there"
    parser.add_argument("--overwrite", action="store_true", help=description)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which examples are read and which of their tokens carry loss."""
    from mora_jax.training.config.schema import keys

    data = dataclasses.replace(keys()["data.train"], name="--data", default=None)
    parser.add_argument("--data", action=KeyAction, key=data, required=True, metavar="FILE", help="data file or files")
    add_keys(parser, "data", "format", "columns", "roles", "on_error", "split", "subset", "max_rows")
    parser.add_argument("--streaming", action="store_true", help="read a hub data set without downloading it first")
    add_keys(parser, "data", "template", "fallback", "max_length", "truncation", "cache")
    add_key(parser, "--loss-mode", "loss.mode")
    add_key(parser, "--loss-roles", "loss.roles")
    add_keys(parser, "loss", "prompt_weight", "end_of_turn", "headers")


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


def load(
    args: argparse.Namespace, adapter: str | None, dtype: str | None, quantize: str = "none", mesh: Any = None
) -> tuple[Any, Any]:
    """Loads the base model with its tokenizer and, if one is given, an adapter.

    Args:
        args: with the options of `add_base`; `model` is filled in where it wasn't given.
        adapter: as for `adapter_folder`.
        dtype: compute dtype, or None for the machine's default.
        quantize: how the layers' kernels are held, as `model.quantize` says.
        mesh: the devices that the model is laid over; None for one.

    Raises:
        InputError: when either can't be loaded, or there is no tokenizer.
    """
    from mora_jax.interop import load_adapter, load_pretrained

    folder = None if adapter is None else adapter_folder(adapter)
    args.model = args.model or base_of(folder)
    shardings = None
    if mesh is not None and mesh.size > 1:
        from mora_jax.training.sharding.rules import base_shardings

        shardings = partial(base_shardings, mesh)
    model, tokenizer = load_pretrained(args.model, dtype=dtype, quantize=quantize, shardings=shardings)
    if tokenizer is None:
        raise InputError(f"{args.model} has no tokenizer files; give a folder with tokenizer.json beside the weights")
    if folder is not None:
        load_adapter(model, folder, **reading(args))
    return model, tokenizer


def base_of(folder: str | None) -> str:
    """The base model that an adapter's folder names; an `InputError` where there is none."""
    from mora_jax.interop.describe import describe_adapter

    if folder is None:
        raise InputError("no model: give --model MODEL, or --adapter with the run that made one")
    base = describe_adapter(folder)["base"]
    if not base:
        raise InputError(f"{folder} names no base model: give --model MODEL")
    return str(base)


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """How adapters are read, as keywords of `mora_jax.load_adapter`."""
    return {"strict": args.strict, "kind": args.adapter_kind}


def adapter_folder(text: str) -> str:
    """The folder of the adapter that `--adapter` names: a folder, a run directory, a hub id, or RUN@STEP.

    For a checkpoint that is a temporary folder, which goes when the process ends.

    Raises:
        InputError: there is no adapter, or no such checkpoint.
    """
    from mora_jax.interop import hub

    run, at, step = text.rpartition("@")
    if not (at and step.isdecimal() and expanded(run).is_dir()) or expanded(text).exists():
        return hub.adapter_folder(text)
    from mora_jax.training.run.saving import export_checkpoint

    place = tempfile.mkdtemp(prefix="mora-jax-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    out = Path(place) / f"{Path(run).name}@{step}"
    export_checkpoint(run, int(step), out)
    return str(out)


def named_adapters(texts: Iterable[str]) -> dict[str, str]:
    """Adapter folders by name, of texts `NAME=PATH` or `PATH`; a path alone is named after its folder.

    Raises:
        InputError: a text lacks one of the two, there is no adapter, or two have one name.
    """
    folders: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or expanded(text).exists():
            name, path = "", text
        elif not name or not path:
            lacks = "no name before its path" if path else "no path behind its name"
            raise InputError(f"--adapter {text}: it has {lacks}; write --adapter PATH or --adapter NAME=PATH")
        folder = adapter_folder(path)
        place = local_path(path)
        # A run directory holds its adapter in a folder that is always called the same.
        name = name or (place.parent if place.name == "adapter" else place).name
        if name in folders:
            raise InputError(f"two adapters are called {name!r}; name them, as in --adapter NAME={path}")
        folders[name] = folder
    return folders


def take_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separates `--config.key=value` and `--config.key value` from the other arguments.

    A key without a value is a switch that is turned on.

    Returns:
        The other arguments, and the (key, text) pairs in order.
    """
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    words = deque(argv)
    while words:
        argument = words.popleft()
        if not argument.startswith(OVERRIDE):
            rest.append(argument)
            continue
        name, equals, text = argument.removeprefix(OVERRIDE).partition("=")
        if not name:
            raise InputError(f"{argument}: a key must follow '{OVERRIDE}', as in {OVERRIDE}train.steps=50")
        if not equals:
            text = words.popleft() if words and not words[0].startswith("--") else "true"
        overrides.append((name, text))
    return rest, overrides
