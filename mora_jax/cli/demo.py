"""Fine-tune the embedded model with every method, print one table and draw the curves."""

import argparse

from mora_jax.demo.options import add_arguments as add_arguments

HELP = "fine-tune a small embedded model with every method and compare"


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mora_jax.demo.run import execute

    return execute(args)
