"""Fold an adapter into its base model and write a HuggingFace folder that transformers and vLLM load."""

import argparse
import sys

from mora_jax.cli.options import ADAPTER, add_base, add_key, add_out, load
from mora_jax.errors import refused

HELP = "fold an adapter into its base model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_base(parser)
    parser.add_argument("--adapter", required=True, metavar="A", help=ADAPTER)
    add_out(parser, required=True)
    add_key(parser, "--dtype", "model.dtype", help="Dtype of the written weights", default="float32")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mora_jax.adapters.merge import merge
    from mora_jax.interop import save_pretrained
    from mora_jax.interop.atomic_folder import check_out
    from mora_jax.interop.hub import local_folder
    from mora_jax.interop.safetensors_io import weight_bytes
    from mora_jax.training.display import bytes_words

    check_out(args.out, overwrite=args.overwrite)

    # Merging is done in float32 whatever is written, so that nothing is rounded twice.
    model, tokenizer = load(args, args.adapter, "float32")
    with refused(args.adapter):
        merge(model)
    save_pretrained(model, args.out, tokenizer, dtype=args.dtype, overwrite=args.overwrite)
    print(f"wrote {args.out}", file=sys.stderr)
    base, merged = weight_bytes(local_folder(args.model)), weight_bytes(local_folder(args.out))
    if merged > 1.5 * base:
        print(
            f"note: {bytes_words(merged)} in {args.dtype}, where the base has {bytes_words(base)}: --dtype bfloat16 "
            "takes half, but rounds away changes below 0.4 % of a weight",
            file=sys.stderr,
        )
    return 0
