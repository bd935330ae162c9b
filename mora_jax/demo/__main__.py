"""`python -m mora_jax.demo`."""

import argparse
import sys

from mora_jax.demo import add_arguments
from mora_jax.demo.run import execute

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m mora_jax.demo")
    add_arguments(parser)
    sys.exit(execute(parser.parse_args()))
