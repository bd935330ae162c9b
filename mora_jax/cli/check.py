"""Say what another program does with an adapter: which tensors it uses, which it drops, refuses or misreads.

By the program's own rules, without it; a merged model's folder is checked for vllm and transformers. With --model,
also whether the adapter fits that model, is named as its own, and how much of it was trained. Exit code 1 where
something would be lost.

  mora-jax check runs/1 --model MODEL --for vllm
"""

import argparse
import json

from mora_jax.cli.options import adapter_folder

HELP = "what vLLM, SGLang, llama.cpp, PEFT or transformers would drop of an adapter"
ENGINE_NAMES = ("peft", "transformers", "vllm", "sglang", "llama.cpp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("folder", metavar="ADAPTER", help="adapter folder, a run directory, or a merged model's folder")
    parser.add_argument(
        "--for", dest="engine", required=True, choices=ENGINE_NAMES, help="the program that is to load it"
    )
    parser.add_argument("--model", metavar="M", help="HuggingFace folder or hub id of the base model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mora_jax.interop.engine_check import check_folder
    from mora_jax.paths import expanded

    is_model = (expanded(args.folder) / "config.json").is_file() and (
        expanded(args.folder) / "model.safetensors"
    ).is_file()
    check = check_folder(args.folder if is_model else adapter_folder(args.folder), args.engine, model=args.model)
    print(json.dumps(check.as_dict()) if args.json else check)
    return 0 if check.good else 1
