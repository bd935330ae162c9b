"""Turn an adapter into another method or layout, or extract one from a full fine-tune.

  mora-jax convert --model M --adapter A --to lora --out DIR [--rank R]
  mora-jax convert --model M --adapter A --to mora --out DIR [--kind K] [--rank R]
  mora-jax convert --model M --adapter A --to peft --out DIR [--rank R]
  mora-jax convert --from-diff BASE TUNED --rank R --out DIR [--to mora --kind K]
  mora-jax convert --from tunix|gemma|keras --model M --adapter CHECKPOINT --out DIR [--alpha A]
  mora-jax convert --model M --adapter A --adapter B --combine cat|svd|linear|sum --weights W W --out DIR [--rank R]

lora: exact where the method's update has low rank (LoRA; MoRA of every kind but rotation and decouple); with --rank the
nearest LoRA of that rank, its relative Frobenius error printed. Without --rank a lossy result is refused.
mora: the least-squares MoRA, its error printed; a MoRA of the same kind comes out as it was, in its authors' layout.
combine: one adapter out of several, its error against the weighted sum of their updates printed. Of LoRA: cat (exact,
the ranks add up), svd (the nearest of a rank) or linear (as in PEFT); of MoRA of one kind: sum (exact).
peft: a folder that PEFT loads; methods that PEFT has keep their form, the others become LoRA.
from: LoRA that Tunix with Qwix, gemma or keras-hub has trained, out of its checkpoint, as a PEFT folder; exact.
"""

import argparse
import json
import sys
from typing import Any

from mora_jax.cli.options import ADAPTER, adapter_folder, add_adapter, add_key, add_number, add_out, named_adapters
from mora_jax.errors import InputError

HELP = "turn an adapter into another method or layout, or extract one from a fine-tune"
TARGETS = ("lora", "mora", "peft")
COMBINATIONS = ("linear", "cat", "svd", "sum")
PROGRAMS = ("tunix", "gemma", "keras")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--model", metavar="M", help="HuggingFace folder or hub id of the base model")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]A", help=f"{ADAPTER}; several with --combine"
    )
    parser.add_argument(
        "--from-diff", nargs=2, metavar=("BASE", "TUNED"), help="two models whose difference to extract"
    )
    parser.add_argument("--from", dest="program", choices=PROGRAMS, help="the program whose checkpoint --adapter is")
    add_number(parser, "--alpha", float, None, "Alpha of Qwix's rule, with --from tunix", above=0)
    parser.add_argument("--to", choices=TARGETS, help="what to write (default with --from-diff: lora)")
    parser.add_argument("--combine", choices=COMBINATIONS, help="how to make one adapter of several")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="the adapters' weights for --combine")
    add_out(parser)
    add_number(parser, "--rank", int, None, "Rank of the result; accepts the error that this makes", at_least=1)
    add_key(parser, "--kind", "adapter.kind", help="Kind of MoRA to fit")
    add_key(parser, "--targets", "adapter.targets", help="Matrices to extract with --from-diff", default="all-linear")
    add_adapter(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    _check_arguments(args)
    if args.from_diff:
        model, conversion = _difference(args)
    elif args.combine:
        model, conversion = _combine(args)
    elif args.program:
        model, conversion = _checkpoint(args), None
    else:
        model, conversion = _convert(args)
    from mora_jax.interop import save_adapter

    save_adapter(model, args.out, overwrite=args.overwrite)
    if conversion is not None:
        print(json.dumps(conversion.to_dict()) if args.json else conversion)
        if conversion.warning is not None:
            print(f"warning: {conversion.warning}; {_instead(args)}", file=sys.stderr)
        if conversion.left_out:
            share = f"{conversion.left_out_share:.3g}"
            print(f"warning: {share} of the change is in tensors that the adapter leaves out", file=sys.stderr)
    print(f"wrote {args.out}", file=sys.stderr)
    if conversion is not None and args.to in ("lora", "peft") and args.rank is None:
        _say_size(args)
    return 0


def _say_size(args: argparse.Namespace) -> None:
    """Says where an exact LoRA is much larger than what it came from, and what makes it smaller."""
    from mora_jax.interop.hub import adapter_folder, local_folder
    from mora_jax.interop.safetensors_io import weight_bytes
    from mora_jax.training.display import bytes_words

    before, after = (weight_bytes(local_folder(path)) for path in (adapter_folder(args.adapter[0]), args.out))
    if after > 1.5 * before:
        print(
            f"note: {bytes_words(after)}, where the adapter had {bytes_words(before)}: --rank R writes the nearest "
            "LoRA of a rank, which is smaller, and states its error",
            file=sys.stderr,
        )


def _instead(args: argparse.Namespace) -> str:
    """What loses less than a conversion did."""
    rank = "a higher --rank" if args.to != "mora" or args.kind is not None or args.from_diff else "another --kind"
    if args.from_diff:
        return f"give {rank}, or keep the tuned model"
    if args.combine:
        return f"give {rank}, or --combine {'sum' if args.combine == 'sum' else 'cat'}, which is exact"
    return f"give {rank}, or use mora-jax merge, which loses nothing"


def _check_arguments(args: argparse.Namespace) -> None:
    if args.from_diff and (args.model or args.adapter):
        raise InputError("--from-diff names both models; leave --model and --adapter away")
    if args.from_diff and args.to == "peft":
        raise InputError("--from-diff writes lora (a PEFT folder) or mora; leave --to peft away")
    unused = [f"--{name}" for name in ("to", "combine", "rank") if getattr(args, name)]
    if args.program and (unused or args.from_diff):
        raise InputError(f"--from writes a PEFT folder; leave {', '.join(unused) or '--from-diff'} away")
    if args.alpha is not None and args.program in (None, "keras"):
        raise InputError("--alpha is for --from tunix")
    if args.combine and (args.to or args.from_diff):
        raise InputError("--combine keeps the adapters' method; leave --to and --from-diff away")
    if len(args.adapter) > 1 and not args.combine:
        raise InputError("several adapters are for --combine; give one --adapter")
    settings = ["weights"] if args.combine else [] if args.program else ["to"]
    wanted = ["out"] if args.from_diff else ["model", "adapter", *settings, "out"]
    absent = [f"--{name}" for name in wanted if not getattr(args, name)]
    if absent:
        raise InputError(f"{', '.join(absent)} missing (see mora-jax convert --help)")
    if args.combine and len(args.weights) != len(args.adapter):
        raise InputError(f"--weights has {len(args.weights)} numbers for {len(args.adapter)} adapters; give one each")
    from mora_jax.interop.atomic_folder import check_out

    check_out(args.out, overwrite=args.overwrite)


def _difference(args: argparse.Namespace) -> tuple[Any, Any]:
    from mora_jax.interop.convert.difference import adapter_from_difference

    base, tuned = args.from_diff
    kind = args.kind if args.to == "mora" else None
    return adapter_from_difference(base, tuned, rank=args.rank, kind=kind, targets=args.targets)


def _convert(args: argparse.Namespace) -> tuple[Any, Any]:
    from mora_jax.interop.convert.convert import convert_to_lora, convert_to_mora, peft_knows
    from mora_jax.interop.load import load_pretrained, load_shapes
    from mora_jax.interop.peft.load import load_adapter, needs_base

    folder = adapter_folder(args.adapter[0])
    model = load_pretrained(args.model, dtype="float32")[0] if needs_base(folder) else load_shapes(args.model)
    load_adapter(model, folder, strict=args.strict, kind=args.adapter_kind)
    if args.to == "mora":
        return model, convert_to_mora(model, kind=args.kind, rank=args.rank)
    if args.to == "peft" and args.rank is None and peft_knows(model):
        return model, None
    return model, convert_to_lora(model, rank=args.rank)


def _combine(args: argparse.Namespace) -> tuple[Any, Any]:
    from mora_jax.interop.adapter_values import install
    from mora_jax.interop.convert.combine import combine
    from mora_jax.interop.load import load_pretrained, load_shapes
    from mora_jax.interop.peft.load import needs_base
    from mora_jax.interop.read_adapter import read_adapter

    folders = named_adapters(args.adapter)
    needs_weights = any(needs_base(folder) for folder in folders.values())
    model = load_pretrained(args.model, dtype="float32")[0] if needs_weights else load_shapes(args.model)
    adapters = {name: read_adapter(model, folder, strict=args.strict)[0] for name, folder in folders.items()}
    weights = dict(zip(folders, args.weights, strict=True))
    by_path, conversion = combine(model, adapters, weights, args.combine, args.rank)
    install(model, by_path)
    return model, conversion


def _checkpoint(args: argparse.Namespace) -> Any:
    from mora_jax.adapters.attach import adapters_of
    from mora_jax.interop.adapter_values import first
    from mora_jax.interop.convert.checkpoints import adapter_from_checkpoint
    from mora_jax.interop.convert.keras import adapter_from_keras

    others: list[str] = []
    if args.program == "keras":
        model = adapter_from_keras(args.adapter[0], args.model)
    else:
        model, others = adapter_from_checkpoint(args.adapter[0], args.program, args.model, alpha=args.alpha)
    ranks = [entry.config.rank for entry in adapters_of(model)]
    print(f"{len(ranks)} matrices carry LoRA of rank {', '.join(map(str, sorted(set(ranks))))}", file=sys.stderr)
    if others:
        print(
            f"note: {len(others)} arrays are no LoRA and were left out, as those of the base: {first(others)}",
            file=sys.stderr,
        )
    return model
