"""Answer a prompt: the text streams to stdout while it is made.

With several adapters each answers under its name in brackets: all at once, as rows of one batch, where they are LoRA or
MoRA of one kind, else one after the other:

  mora-jax generate --model M --adapter poet=runs/1 --adapter coder=runs/2 --prompt P
"""

import argparse
import sys
from typing import Any

from mora_jax.cli.options import ADAPTER, add_adapter, add_key, add_number
from mora_jax.errors import InputError

HELP = "answer a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--model", required=True, metavar="M", help="HuggingFace folder or hub id of the base model")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]A",
        help=f"{ADAPTER}; several may be given",
    )
    add_adapter(parser)
    add_key(parser, "--dtype", "model.dtype")
    add_key(parser, "--quantize", "model.quantize")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the user's message")
    parser.add_argument("--system", metavar="TEXT", help="a system message before it")
    add_number(parser, "--max-new-tokens", int, 256, "Most tokens of the answer.", at_least=1)
    add_number(parser, "--temperature", float, 0.0, "0 takes the likeliest token; larger is freer.", at_least=0)
    add_number(parser, "--top-p", float, 1.0, "Draws among the likeliest tokens of this share.", above=0, at_most=1)
    add_key(parser, "--seed", "seed", help="Equal seeds give equal draws")
    add_key(parser, "--template", "data.template")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    import jax

    from mora_jax.cli.load import load, named_adapters
    from mora_jax.evaluation import Sampling, stream_text

    # Measured with 135 M parameters, one row at a time on CPU: float32 takes as long a token as bfloat16
    # (benchmarks/decoding.py), reads the prompt faster, and is exact.
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else None)
    adapters = named_adapters(args.adapter)
    only = next(iter(adapters.values())) if len(adapters) == 1 else None
    reading = {"strict": args.strict, "kind": args.adapter_kind}
    model, tokenizer = load(args.model, only, dtype, quantize=args.quantize, **reading)
    messages = [{"role": "user", "content": args.prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    options = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": Sampling(args.temperature, args.top_p, args.seed),
        "template": args.template,
    }
    if len(adapters) > 1:
        _answer_each(model, tokenizer, messages, adapters, reading, options)
        return 0
    for piece in stream_text(model, tokenizer, messages, **options):
        print(piece, end="", flush=True)
    print(flush=True)
    return 0


def _answer_each(
    model: Any, tokenizer: Any, messages: list, adapters: dict[str, str], reading: dict[str, Any], options: dict
) -> None:
    """Prints what each adapter answers."""
    from mora_jax.evaluation import generate_batch
    from mora_jax.evaluation.text_stream import REPLACEMENT
    from mora_jax.interop.multi_adapter import NamedAdapters

    named = NamedAdapters(model, slots=len(adapters))
    try:
        if reading["kind"] is not None:
            raise InputError("--adapter-kind is read for one at a time")
        for name, folder in adapters.items():
            named.load(folder, name, strict=reading["strict"])
    except InputError as error:
        # What is wrong with an adapter by itself comes up again, before anything is answered.
        named.clear()
        _answer_in_turn(model, tokenizer, messages, adapters, reading, options, why=str(error))
        return
    prompts = [messages] * len(adapters)
    ids = named.ids(named.names)
    answers = generate_batch(model, tokenizer, prompts, adapter_ids=ids, numbers=[0] * len(prompts), **options)
    for name, answer in zip(adapters, answers, strict=True):
        print(f"[{name}]\n{answer.rstrip(REPLACEMENT)}\n")


def _answer_in_turn(
    model: Any,
    tokenizer: Any,
    messages: list,
    adapters: dict[str, str],
    reading: dict[str, Any],
    options: dict,
    *,
    why: str,
) -> None:
    """Prints what each adapter answers, for those that can't share a batch."""
    from mora_jax.evaluation import stream_text
    from mora_jax.interop import load_adapter
    from mora_jax.interop.read_adapter import bare

    loaded: dict[str, Any] = {name: bare(model) for name in adapters}  # one base; adapters are small beside it
    for name, folder in adapters.items():
        load_adapter(loaded[name], folder, **reading)
    print(f"the adapters answer one after the other: {why}", file=sys.stderr)
    for name in adapters:
        print(f"[{name}]")
        for piece in stream_text(loaded.pop(name), tokenizer, messages, **options):
            print(piece, end="", flush=True)
        print("\n", flush=True)
