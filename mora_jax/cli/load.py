"""Loading what `--model` and `--adapter` name."""

import argparse
import atexit
import shutil
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from mora_jax.errors import InputError
from mora_jax.paths import expanded, local_path


def load(
    args: argparse.Namespace, adapter: str | None, dtype: str | None, quantize: str = "none", mesh: Any = None
) -> tuple[Any, Any]:
    """Loads the model of `--model` with its tokenizer and, if one is given, an adapter.

    Args:
        args: with the options of `add_adapter` beside `--model`.
        adapter: as for `adapter_folder`.
        dtype: compute dtype, or None for the machine's default.
        quantize: how the layers' kernels are held, as `model.quantize` says.
        mesh: the devices that the model is laid over; None for one.

    Raises:
        InputError: when either can't be loaded, or there is no tokenizer.
    """
    from mora_jax.interop import load_adapter, load_pretrained

    folder = None if adapter is None else adapter_folder(adapter)
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
