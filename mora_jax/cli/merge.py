"""Fold an adapter into its base model and write a HuggingFace folder that transformers and vLLM load."""

import argparse
import sys
from pathlib import Path

from mora_jax.cli.options import add_adapter, add_key
from mora_jax.errors import InputError

HELP = "fold an adapter into its base model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--model", required=True, metavar="M", help="HuggingFace folder or hub id of the base model")
    parser.add_argument("--adapter", required=True, metavar="A", help="adapter folder, or a run directory")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist yet")
    add_adapter(parser)
    add_key(parser, "--dtype", "model.dtype", help="Dtype of the written weights", default="float32")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    out = Path(args.out)
    if out.exists():
        raise InputError(f"--out {out} exists already; give a folder that doesn't, or remove it")
    from mora_jax.adapters.merge import merge
    from mora_jax.cli.models import load
    from mora_jax.interop import save_pretrained

    # Merging is done in float32 whatever is written, so that nothing is rounded twice.
    model, tokenizer = load(args.model, args.adapter, "float32", strict=args.strict, kind=args.adapter_kind)
    try:
        merge(model)
    except ValueError as error:
        raise InputError(f"{args.adapter}: {error}") from None
    save_pretrained(model, out, tokenizer, dtype=args.dtype)
    print(f"wrote {out}", file=sys.stderr)
    return 0
