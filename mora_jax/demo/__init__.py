"""A small embedded base model, an instruction set, and the demo that fine-tunes one on the other.

`python -m mora_jax.demo` runs it. Importing this package starts nothing; it gives the
paths of what is embedded.
"""

import argparse
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
PARTS = ("train", "held_out", "test")
#: Text like that which the base model was pretrained on, and wasn't.
TEXTS = str(ASSETS / "held_out_texts.jsonl")
STEPS = 110


def model_path() -> str:
    """The folder of the embedded base model, in HuggingFace's layout.

    >>> import json, pathlib
    >>> json.loads((pathlib.Path(model_path()) / "config.json").read_text())["model_type"]
    'llama'
    """
    return str(ASSETS / "model")


def data_path(part: str = "train") -> str:
    """The file of one part of the embedded instruction set.

    `train` is to train on. `held_out` is for validation: learning rates and the like are chosen
    on it. `test` is to report, and nothing was chosen on it. The three share no content.

    >>> data_path("held_out").endswith("instructions_held_out.jsonl")
    True
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
    return str(ASSETS / f"instructions_{part}.jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options."""
    parser.add_argument("--out", default="demo_out", help="folder of plot and figures")
    parser.add_argument(
        "--steps", type=_positive, default=STEPS, help=f"optimiser steps of each cell (default {STEPS})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of adapters and data order (default 0)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number of steps")
    return value
