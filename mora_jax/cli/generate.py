"""Answer a prompt: the text streams to stdout while it is made.

With several adapters each answers under its name in brackets: all at once, as rows of one batch, where they are LoRA or
MoRA of one kind, else one after the other:

  mora-jax generate --model M --adapter poet=runs/1 --adapter coder=runs/2 --prompt P

Many prompts are answered in batches, in their order, with one loading: a text a line, or JSON objects with "prompt" or
"messages". --json writes an object a line, with the answer in it:

  mora-jax generate --model M --prompts questions.txt --json > answers.jsonl
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mora_jax.cli.options import (
    add_adapters,
    add_key,
    add_keys,
    add_model,
    add_number,
    base_of,
    load,
    named_adapters,
    reading,
)
from mora_jax.errors import InputError

HELP = "answer a prompt, or many"
# Batches whose prompts are sorted by length together, and whose answers are written before others begin.
_BATCHES = 16


class Group(NamedTuple):
    """Adapters that answer in one batch.

    Attributes:
        model: carries them.
        names: theirs; None for a model that answers without a name.
        ids: of several named adapters on the model.
    """

    model: Any
    names: Sequence[str | None]
    ids: Sequence[int] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_speaking(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="the user's message")
    what.add_argument("--prompts", metavar="FILE", help="file of prompts, one a line; - reads them from stdin")
    add_number(parser, "--batch-size", int, 8, "Prompts of --prompts that are answered at once", at_least=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object an answer")


def add_speaking(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say who answers, and how."""
    add_model(parser)
    add_adapters(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the user's")
    add_number(parser, "--max-new-tokens", int, 256, "Most tokens of the answer.", at_least=1)
    add_number(parser, "--temperature", float, 0.0, "0 takes the likeliest token; larger is freer.", at_least=0)
    add_number(parser, "--top-p", float, 1.0, "Draws among the likeliest tokens of this share.", above=0, at_most=1)
    add_key(parser, "--seed", "seed", help="Equal seeds give equal draws")
    add_keys(parser, "data", "template")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mora_jax.evaluation.chat import Prompt, stream_text

    if args.prompts is not None:
        prompts = _read(args.prompts, args.system)
    else:
        prompts = [Prompt.of("--prompt", args.prompt, args.system)]
    adapters = named_adapters(args.adapter)
    model, tokenizer, options = load_speaker(args, adapters, attach=len(adapters) == 1)
    groups = _groups(model, adapters, args) if len(adapters) > 1 else [Group(model, [None])]
    if args.prompts is not None or args.json or groups[0].ids is not None:
        _answer_all(groups, tokenizer, prompts, args, options)
        return 0
    while groups:
        group = groups.pop(0)
        if group.names[0] is not None:
            print(f"[{group.names[0]}]")
        for piece in stream_text(group.model, tokenizer, prompts[0].messages, **options):
            print(piece, end="", flush=True)
        print("" if group.names[0] is None else "\n", flush=True)
    return 0


def load_speaker(
    args: argparse.Namespace, adapters: dict[str, str], *, attach: bool
) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and how answers are made.

    Args:
        args: the options of `add_speaking`.
        adapters: folders by name; the first says what the base is where `--model` isn't given.
        attach: the first one is loaded too.
    """
    import jax

    from mora_jax.evaluation import Sampling

    # Measured with 135 M parameters, one row at a time on CPU: float32 takes as long a token as bfloat16
    # (benchmarks/decoding.py), reads the prompt faster, and is exact.
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else None)
    first = next(iter(adapters.values()), None)
    args.model = args.model or base_of(first)
    model, tokenizer = load(args, first if attach else None, dtype, args.quantize)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    return model, tokenizer, {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "template": args.template}


def models_of(model: Any, adapters: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """A model for each adapter, all on the arrays of one base."""
    from mora_jax.interop import load_adapter
    from mora_jax.interop.read_adapter import bare

    models: dict[str, Any] = {name: bare(model) for name in adapters}
    for name, folder in adapters.items():
        load_adapter(models[name], folder, **reading(args))
    return models


def _groups(model: Any, adapters: dict[str, str], args: argparse.Namespace) -> list[Group]:
    """Several adapters: in one batch where they can be, else each by itself."""
    from mora_jax.interop.multi_adapter import NamedAdapters

    bank = NamedAdapters(model, slots=len(adapters))
    try:
        if args.adapter_kind is not None:
            raise InputError("--adapter-kind is read for one at a time")
        for name, folder in adapters.items():
            bank.load(folder, name, strict=args.strict)
    except InputError as error:
        # What is wrong with an adapter by itself comes up again, before anything is answered.
        bank.clear()
        models = models_of(model, adapters, args)
        print(f"the adapters answer one after the other: {error}", file=sys.stderr)
        return [Group(models[name], [name]) for name in adapters]
    return [Group(model, list(adapters), bank.ids(bank.names).tolist())]


def _read(path: str, system: str | None) -> Any:
    from mora_jax.data.read.files import open_bytes
    from mora_jax.evaluation.chat import read_prompts
    from mora_jax.paths import local_path

    if path != "-":
        with open_bytes(local_path(path)) as file:
            return read_prompts(file, path, system)
    if sys.stdin is None:
        raise InputError("--prompts - reads standard input, which is closed")
    return read_prompts(sys.stdin.buffer, "standard input", system)


def _answer_all(groups: list[Group], tokenizer: Any, prompts: Sequence[Any], args: Any, options: dict) -> None:
    """Prints the answers to prompts, in their order."""
    from mora_jax.display.progress import progress

    _check_room(groups[0].model, tokenizer, prompts, options["template"])
    with progress("answering") as report:
        answers = _answers(groups, tokenizer, prompts, args.batch_size, options, report)
        for number, (prompt, spoken) in enumerate(zip(prompts, answers, strict=True), start=1):
            for name, answer in spoken:
                if args.json:
                    adapter = {} if name is None else {"adapter": name}
                    print(json.dumps({**prompt.given, **adapter, "answer": answer}, ensure_ascii=False), flush=True)
                    continue
                head = " ".join(filter(None, (str(number) if len(prompts) > 1 else "", name)))
                print(f"[{head}]\n{answer}\n" if head else answer, flush=True)


def _check_room(model: Any, tokenizer: Any, prompts: Sequence[Any], template: str | None) -> None:
    """Refuses a prompt that can't be answered, before any is.

    Raises:
        InputError: naming its line.
    """
    from mora_jax.data.templates.render import render_prompt
    from mora_jax.evaluation.generate import check_room

    for prompt in prompts:
        try:
            check_room(len(render_prompt(tokenizer, prompt.messages, template).input_ids), model)
        except InputError as error:
            raise InputError(f"{prompt.where}: {error}") from None


def _answers(
    groups: list[Group], tokenizer: Any, prompts: Sequence[Any], batch_size: int, options: dict, report: Any
) -> Iterator[list[tuple[str | None, str]]]:
    """What each adapter answers to each prompt: (name, text) pairs a prompt."""
    from mora_jax.evaluation.chat import REPLACEMENT, generate_batch

    total, done = len(prompts) * sum(len(group.names) for group in groups), 0
    for start in range(0, len(prompts), _BATCHES * batch_size):
        part = range(start, min(start + _BATCHES * batch_size, len(prompts)))
        answers: list[list[tuple[str | None, str]]] = [[] for _ in part]
        for group in groups:
            asked = [(number, name) for number in part for name in group.names]
            texts = generate_batch(
                group.model,
                tokenizer,
                [prompts[number].messages for number, _ in asked],
                batch_size=batch_size * len(group.names),
                adapter_ids=None if group.ids is None else [*group.ids] * len(part),
                numbers=[number for number, _ in asked],
                progress=lambda now, _, done=done: report(done + now, total),  # type: ignore[misc]
                **options,
            )
            done += len(texts)
            for (number, name), text in zip(asked, texts, strict=True):
                answers[number - start].append((name, text.rstrip(REPLACEMENT)))
        yield from answers
