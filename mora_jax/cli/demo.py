"""Fine-tune the embedded model with LoRA, MoRA and in full, on masked and unmasked loss; print a table, draw a plot."""

import argparse

from mora_jax.demo import add_arguments as add_arguments

HELP = "compare LoRA, MoRA and full fine-tuning on the embedded model"


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mora_jax.display.progress import progress

    with progress("loading") as report:
        report(0, args.steps)
        from mora_jax.demo.run import execute

    return execute(args)
