"""The demo's options, apart from the demo itself so that asking for help imports no jax."""

from __future__ import annotations

import argparse

STEPS = 110


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
