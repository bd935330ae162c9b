"""Fine-tune the embedded model with every method, masked and unmasked; print a table, draw a plot."""

import argparse

from mora_jax.demo.options import add_arguments as add_arguments

HELP = "compare all methods on the embedded model"


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mora_jax.demo.run import execute

    return execute(args)
